"""The devices of a run and the processes that use them."""
