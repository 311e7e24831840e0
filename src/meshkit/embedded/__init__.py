"""An AMQP 0-9-1 server, and a receiver of traces, that run in the process: for tests, demos and a laptop.

`AmqpServer` speaks the protocol on a real socket, so any client works against it unchanged, and follows the rules of
RabbitMQ for classic and quorum queues. It binds loopback only, keeps nothing after it ends, and refuses loudly what it
does not do: clusters, streams, policies, transactions, TLS, more than one virtual host. The trace receiver is
`meshkit.embedded.otlp`.
"""

from meshkit.embedded.faults import Faults
from meshkit.embedded.server import (
    AmqpServer,
    MessageView,
    QueueView,
    ServerClock,
    ThreadedServer,
    run_in_thread,
    serve,
)

__all__ = [
    "AmqpServer",
    "Faults",
    "MessageView",
    "QueueView",
    "ServerClock",
    "ThreadedServer",
    "run_in_thread",
    "serve",
]
