"""Assembles the gRPC server: the services, health, reflection, and the interceptor around them all."""

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cbp_proto.v1 import learner_service_pb2, learner_service_pb2_grpc
from cbp_server.learners.host import Host
from cbp_server.limits import Limits
from cbp_server.process.addresses import with_port
from cbp_server.rpc.interceptor import CallInterceptor, RpcObserver
from cbp_server.rpc.learner_servicer import LearnerServicer
from cbp_server.rpc.training_servicer import TRAINING_SERVICE, TrainingServicer, add_training_service

_SERVICES = (
    learner_service_pb2.DESCRIPTOR.services_by_name["LearnerService"].full_name,
    TRAINING_SERVICE,
)
#: gRPC itself refuses what is larger than this many times max_message_bytes; up to there our own error says why.
_TRANSPORT_HEADROOM = 2


class RpcServer:
    """The gRPC side of the front process.

    Args:
        max_message_bytes: largest batch or prediction request.
        limits: what a new spec, or the examples of one message, may claim.
    """

    def __init__(self, host: Host, observer: RpcObserver, *, max_message_bytes: int, limits: Limits) -> None:
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(observer)],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes * _TRANSPORT_HEADROOM + 2**16),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ],
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        learner_service_pb2_grpc.add_LearnerServiceServicer_to_server(LearnerServicer(host, limits), self._server)
        add_training_service(TrainingServicer(host, max_message_bytes=max_message_bytes, limits=limits), self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, addresses: Sequence[str], port: int) -> int:
        """Listens on one port of every address; the port, which with 0 the system chooses. Health is NOT_SERVING until
        `set_serving` says otherwise.

        Raises:
            OSError: one of them cannot be bound.
        """
        for address in addresses:
            endpoint = with_port(address, port)
            try:
                port = self._server.add_insecure_port(endpoint)
            except RuntimeError as error:
                raise OSError(f"cannot listen on {endpoint}: is another server running there?") from error
        await self.set_serving(False)
        await self._server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1.Health says of the server and of each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *_SERVICES):
            await self._health.set(service, status)

    async def stop(self, grace_seconds: float) -> None:
        """Refuses new calls and ends the open ones once they finish or the grace is over."""
        await self._server.stop(grace_seconds)
