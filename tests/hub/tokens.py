"""Who there is on the Hub of the tests. The tokens look like real ones, so that a search for leaked tokens finds them."""

from tests.hub.store import User

TOKEN = "hf_" + "doGEwriteTokenOfTheTests0123456789"
READ_TOKEN = "hf_" + "doGEreadTokenOfTheTests01234567890"
OTHER_TOKEN = "hf_" + "otherWriteTokenOfTheTests012345678"
BAD_TOKEN = "hf_" + "thisTokenIsNotKnownToTheHub0123456"

USERS = {
    TOKEN: User("doge", "write", ("doge-lab",)),
    READ_TOKEN: User("doge", "read", ("doge-lab",)),
    OTHER_TOKEN: User("stranger", "write"),
}
