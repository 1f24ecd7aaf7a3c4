"""Serves the control service, through which the gateway and the command line follow the controller."""

from collections.abc import AsyncIterator

import grpc

from orchestrator.controller.shell import ControllerShell
from orchestrator.launcher.node import host_port
from protos.heterodyne.control.v1 import control_pb2 as pb
from protos.heterodyne.control.v1 import control_pb2_grpc as pb_grpc


class ControlService(pb_grpc.ControlServicer):
    """Streams the state of the deployment, and hears of leaders that no longer answer."""

    def __init__(self, shell: ControllerShell) -> None:
        self._shell = shell

    async def Watch(
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[pb.WatchRequest, pb.WatchResponse]
    ) -> AsyncIterator[pb.WatchResponse]:
        """Streams the deployment as it is now and after every change."""
        async for message in self._shell.watch():
            yield message

    async def ReportLost(
        self,
        request: pb.ReportLostRequest,
        context: grpc.aio.ServicerContext[pb.ReportLostRequest, pb.ReportLostResponse],
    ) -> pb.ReportLostResponse:
        """Fails the replica of a leader that no longer answers, and ends its processes."""
        await self._shell.report_lost(request.replica, request.epoch, request.cause)
        return pb.ReportLostResponse()


async def start_control_server(
    shell: ControllerShell, bind_host: str, *, advertise_host: str | None = None
) -> tuple[grpc.aio.Server, str]:
    """Serves on a free port of ``bind_host``. Returns the server and its address, at ``advertise_host`` if given."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_ControlServicer_to_server(ControlService(shell), server)
    port = server.add_insecure_port(host_port(bind_host, 0))
    await server.start()
    return server, host_port(advertise_host or bind_host, port)
