"""Task of the broadcast: publish the champion."""

from datetime import timedelta

from flytekit import Resources, task

from images import specs
from tasks.decks import show
from tasks.errors import retry_recoverable
from tasks.federation import ConfigFile, opened
from tier1.loops.records import Published


@task(
    container_image=specs.tier1,
    requests=Resources(cpu="500m", mem="1Gi"),
    retries=3,
    timeout=timedelta(minutes=30),
    enable_deck=True,
    deck_fields=(),
)
@retry_recoverable
def publish(config: ConfigFile) -> Published:
    """Publish the champion's snapshot and tell the devices; blobs they already hold are not sent again."""
    from tier1.loops.broadcast import publish_champion
    from tier1.loops.reports import published_html

    with opened(config) as fed:
        published = publish_champion(fed)
        show("Published", published_html(published))
        return published
