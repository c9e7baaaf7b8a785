"""The server's side: fedge's rounds on Flower's grid."""

from fedge.flower import server_app

app = server_app()
