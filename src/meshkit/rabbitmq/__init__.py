"""RabbitMQ: typed events on a bus of one's own, or the queue one has, without losing a message.

bus = RabbitBus(service="course-service")                        # publish and subscribe typed events
consumer = await consume("orders", handler, retry="10s*3")       # retries and dead letters for an existing queue
"""

from meshkit.messaging.message import Delivery
from meshkit.rabbitmq.adopt import AdoptedMessage, consume
from meshkit.rabbitmq.bus import RabbitBus
from meshkit.rabbitmq.consumer import Consumer

__all__ = ["AdoptedMessage", "Consumer", "Delivery", "RabbitBus", "consume"]
