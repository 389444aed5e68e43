"""
An influence index as a Space: the page of `hf-doge view`, of an index on the Hub that is read in parts.

Set the variable `INDEX` of the Space to the name of the index (and `REVISION` to a commit, so that what is shown stays what you
looked at); an index that is private needs a secret `HF_TOKEN` that may read it. Here: `INDEX=influence python app.py`.
"""

import os

from hf_doge import InfluenceIndex
from hf_doge.cli.view import Viewer, make_page, serve

index = InfluenceIndex.from_pretrained(os.environ["INDEX"], revision=os.environ.get("REVISION"), streaming=True)
page = make_page(Viewer(index))
serve(page)
page.block_thread()
