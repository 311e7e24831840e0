"""One file a policy. A policy is one coroutine around `call_next`; it holds no metric and no log call."""
