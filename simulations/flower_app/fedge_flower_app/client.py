"""A site's side: the bundle's engine on the site's rows.

Replace ``load`` by a function that reads your own rows; nothing else changes.
"""

from flwr.app import Context

from fedge.data import breast_cancer_hospitals
from fedge.flower import client_app
from fedge.types import ClientData


def load(context: Context) -> ClientData:
    """The hospital whose number the node's config gives as ``partition-id``."""
    return breast_cancer_hospitals(seed=0)[int(context.node_config["partition-id"])]


app = client_app(load)
