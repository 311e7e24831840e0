"""`docs/metrics.md`, from the catalogue."""

from meshkit.telemetry.catalogue import METRICS, Label, Metric


def metrics_page() -> str:
    """The page that lists every metric, its labels and their values, as Markdown."""
    lines = [
        "# Metrics",
        "",
        "Made from `meshkit.telemetry.catalogue` by `meshkit.pack`; edit the catalogue, not this page.",
        "",
        "Names and labels are a public contract: they change with a major version only. `job` and `instance` come from",
        "the scrape. An open label takes its values from your own names; how many is capped, further ones are counted as",
        "`__other__` and in `meshkit_metric_label_overflow_total`. Counters whose labels have closed values start at 0.",
        "A metric marked *exemplars* carries the trace of sampled spans, where Prometheus runs with",
        "`--enable-feature=exemplar-storage`.",
        "",
        "| metric | kind | labels | what it says |",
        "|---|---|---|---|",
        *(_row(metric) for metric in METRICS),
        "",
        "## Labels",
        "",
        "| label | of | what it says | values |",
        "|---|---|---|---|",
        *_label_rows(),
        "",
        "## Buckets",
        "",
        "Upper bounds in seconds. 0.15, 0.2 and 0.3 are added to the boundaries of the OpenTelemetry conventions, which",
        "jump from 0.1 to 0.25: a target of 200 ms has to be a boundary to be measured.",
        "",
        *_bucket_rows(),
    ]
    return "\n".join(lines) + "\n"


def _row(metric: Metric) -> str:
    kind = metric.kind + (", exemplars" if metric.exemplars else "")
    labels = ", ".join(f"`{name}`" for name in metric.label_names)
    return f"| `{metric.name}` | {kind} | {labels} | {metric.help} |"


def _label_rows() -> list[str]:
    users: dict[Label, list[str]] = {}
    for metric in METRICS:
        for label in metric.labels:
            users.setdefault(label, []).append(metric.name)
    rows = []
    for label, names in users.items():
        # A label with one meaning everywhere needs no list of metrics beside it.
        of = f"`{names[0]}`" if len(names) == 1 else f"{len(names)} metrics"
        values = ", ".join(f"`{value}`" for value in label.values) or "open"
        rows.append(f"| `{label.name}` | {of} | {label.help} | {values} |")
    return rows


def _bucket_rows() -> list[str]:
    users: dict[tuple[float, ...], list[str]] = {}
    for metric in METRICS:
        if metric.buckets:
            users.setdefault(metric.buckets, []).append(f"`{metric.name}`")
    return [f"* {', '.join(f'{bound:g}' for bound in buckets)}: {', '.join(names)}" for buckets, names in users.items()]
