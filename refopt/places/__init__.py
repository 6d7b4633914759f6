"""Places: where states live. One file a place, one record a file. `PLACES` lists them by stem."""

from refopt.places.disk import place as disk
from refopt.places.host import place as host
from refopt.places.paged import place as paged
from refopt.places.resident import place as resident

PLACES = {p.stem: p for p in (resident, paged, host, disk)}

__all__ = ["PLACES", "disk", "host", "paged", "resident"]
