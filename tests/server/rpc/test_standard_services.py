"""What standard tools expect: health checking per service, and reflection."""

from typing import cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client import CollectorRegistry

from cbp_server.learners.host import Host
from cbp_server.metrics.service import RpcMetrics
from cbp_server.process.addresses import with_port
from cbp_server.rpc.server import RpcServer
from cbp_server.settings import Settings


@pytest.mark.parametrize("service", ["", "cbp.v1.LearnerService", "cbp.v1.TrainingService"])
def test_every_service_is_healthy(wire, service):
    health = health_pb2_grpc.HealthStub(wire.channel)
    answer = health.Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("service", ["", "cbp.v1.LearnerService", "cbp.v1.TrainingService"])
async def test_no_service_is_healthy_before_the_server_is_ready(service):
    settings = Settings()
    server = RpcServer(
        cast(Host, None), RpcMetrics(CollectorRegistry()), max_message_bytes=1024, limits=settings.limits
    )
    port = await server.start(["127.0.0.1"], 0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=service)
            assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await server.set_serving(True)
            assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.stop(0)


async def test_it_listens_on_one_port_of_every_address():
    addresses = ["127.0.0.1", "127.0.0.2"]
    server = RpcServer(
        cast(Host, None), RpcMetrics(CollectorRegistry()), max_message_bytes=1024, limits=Settings().limits
    )
    port = await server.start(addresses, 0)
    try:
        for address in addresses:
            async with grpc.aio.insecure_channel(with_port(address, port)) as channel:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    finally:
        await server.stop(0)


def test_health_of_an_unknown_service_is_not_found(wire):
    health = health_pb2_grpc.HealthStub(wire.channel)
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="nonsense"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(wire):
    services = set(ProtoReflectionDescriptorDatabase(wire.channel).get_services())
    assert {"cbp.v1.LearnerService", "cbp.v1.TrainingService", "grpc.health.v1.Health"} <= services


def test_an_unknown_method_is_unimplemented(wire):
    call = wire.channel.unary_unary("/cbp.v1.LearnerService/Nonsense")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
