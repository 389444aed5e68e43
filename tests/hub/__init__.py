"""
A Hub on loopback for the tests: the real protocol, faults on order, and no network.

`HubServer` starts it in a process of its own; `run_client` runs a script with an unmodified huggingface_hub, datasets or
transformers against it. `HubControl(url)` is the same handle from within such a script.

    with HubServer(tmp_path / "hub") as hub:
        hub.fail("POST", "/commit/", status=503)
        run_client(hub, "from huggingface_hub import HfApi; ...")
        hub.commits("doge/mixture")
"""

from tests.hub.handle import (
    HubControl,
    HubServer,
    LoggedRequest,
    client_environment,
    last_json,
    run_client,
    start_client,
)

__all__ = ["HubControl", "HubServer", "LoggedRequest", "client_environment", "last_json", "run_client", "start_client"]
