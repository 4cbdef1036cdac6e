"""A Hub on loopback: what huggingface_hub asks for, over real HTTP, with faults to order.

    with HubServer() as hub:
        Client(hub, folder).call("push", out, "ann/model")
        assert hub.repos["ann/model"].content() == ...

It keeps files in memory, logs every request, and fails where a test says so (`HubServer.fail`).
"""

from hub_server.client import Answer, Client
from hub_server.faults import Fault
from hub_server.server import HubServer, Request
from hub_server.store import Blob, Repo, content

__all__ = ["Answer", "Blob", "Client", "Fault", "HubServer", "Repo", "Request", "content"]
