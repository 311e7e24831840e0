"""The names of RabbitMQ's own metrics that dashboards and rules may use.

They are the broker's to change, and it has changed them between versions; the tests hold this list against what a
live broker exposes. All of them are in RabbitMQ 3.10 and, by its source, in 4.x.
"""

# From `/metrics/detailed`, which answers with no queue at all unless families are asked for by name. A broker ignores
# a family it does not know, so asking 3.x for `queue_delivery_metrics` (4.0) does no harm.
DETAILED_FAMILIES = ("queue_coarse_metrics", "queue_consumer_count", "queue_metrics", "queue_delivery_metrics")

BROKER_METRICS = frozenset(
    {
        "rabbitmq_detailed_queue_messages",
        "rabbitmq_detailed_queue_messages_ready",
        "rabbitmq_detailed_queue_messages_unacked",
        "rabbitmq_detailed_queue_consumers",
        "rabbitmq_alarms_memory_used_watermark",
        "rabbitmq_alarms_free_disk_space_watermark",
        "rabbitmq_global_messages_dead_lettered_rejected_total",
        "rabbitmq_global_messages_dead_lettered_expired_total",
        "rabbitmq_global_messages_dead_lettered_maxlen_total",
        "rabbitmq_global_messages_dead_lettered_delivery_limit_total",
        "rabbitmq_global_messages_unroutable_returned_total",
        "rabbitmq_global_messages_unroutable_dropped_total",
        "rabbitmq_identity_info",
    }
)
