"""Replicas on Ray Serve: the application of one process, as often as there is to do, on one machine or many. Nothing else imports ray.

A replica is an actor with a session, a batch and the whole application; Ray starts it, restarts it and counts what runs on it. What
stands before them (runtimes/serving/front.py) runs where ``serve`` was called. Adapters are Ray's multiplexed models: of the replicas
with room, one that has the adapter in memory is preferred.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import ReplicaUnavailableError

from runtimes.errors import InputError, ReftError
from runtimes.open import open_artifact
from runtimes.serving.app import create_app
from runtimes.serving.forwarded import SEED_BYTES, TEXT, Forwarded, answered
from runtimes.serving.front import ReplicaLost, create_front
from runtimes.serving.gate import Message
from runtimes.serving.process import Running, bind, text_server
from runtimes.serving.settings import BatchSettings, ServeSettings
from runtimes.serving.shared_folder import SharedFolder

LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, ReplicaUnavailableError)
TOLD = 64
"""Adapters that a replica tells Ray of, those used last."""
told_to_ray: Any = serve.multiplexed(max_num_models_per_replica=TOLD)
"""Its own type says that it makes a coroutine, which cannot be called."""
STARTS = 3
"""Times that a replica which does not start is tried."""
CONNECT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """``least`` to ``most`` replicas, as many as there is to do; ``address`` of a Ray cluster's head, None: one of this machine's own."""

    least: int
    most: int
    address: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InputError(f"replicas are {self.least}-{self.most}, expected at least 1, and MIN at most MAX")


class Replica:
    """One process that answers."""

    def __init__(self, bundle: Path, settings: ServeSettings, batch: BatchSettings) -> None:
        self._closing = ExitStack()
        self._server = self._closing.enter_context(text_server(bundle, settings, batch))
        self._app = create_app(self._server, log=lambda _: None)  # the front tells all of it
        self._folder = SharedFolder(self._server)

    @told_to_ray
    async def loaded(self, name: str) -> str:
        await asyncio.to_thread(self._server.bank.load, name)
        return name

    async def answer(self, request: Forwarded) -> AsyncGenerator[Message, None]:
        if request.path in ("/v1/models", "/v1/adapters"):
            await self._folder.refresh_all()
        async with self._folder.use(request.adapter, changes=request.changes):
            if request.adapter is not None and request.path in TEXT:
                with suppress(ReftError):  # the application says why
                    await self.loaded(request.adapter)
            async for message in answered(self._app, request):
                yield message

    def process(self) -> int:
        return os.getpid()

    def __del__(self) -> None:
        self._closing.close()


class RayReplicas:
    """Those behind ``handle``."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def ask(self, request: Forwarded) -> AsyncGenerator[Message, None]:
        chosen = self.handle.options(stream=True, method_name="answer", multiplexed_model_id=request.adapter or "")
        answer = chosen.remote(request)
        try:
            async for message in answer:
                yield message
        except LOST as e:
            raise ReplicaLost from e
        finally:
            answer.cancel()


@contextmanager
def replicas(bundle: Path, settings: ServeSettings, batch: BatchSettings, cluster: ClusterSettings) -> Iterator[RayReplicas]:
    """Started, and ready; gone at the end. Raises ReftError where Ray does not answer, has too few processors, or no replica starts."""
    batch = replace(batch, threads=batch.threads or (max(1, (os.cpu_count() or 1) // cluster.most) if cluster.address is None else 1))
    settings = replace(settings, max_body=settings.max_body + SEED_BYTES, adapters=settings.adapters and settings.adapters.absolute())
    _start(cluster, processors=cluster.most * (batch.threads or 1))
    name = f"reft-export-{secrets.token_hex(4)}"
    try:
        _check_room(cluster.least * (batch.threads or 1))
        scaling: dict[str, Any] = {"num_replicas": cluster.least}
        if cluster.most > cluster.least:
            counts = {"min_replicas": cluster.least, "max_replicas": cluster.most, "target_ongoing_requests": batch.rows}
            scaling = {"autoscaling_config": counts}
        # Twice its rows: a row that ends is followed at once.
        deployment = serve.deployment(Replica).options(
            name="Replica",
            ray_actor_options={"num_cpus": batch.threads},
            max_ongoing_requests=2 * batch.rows,
            graceful_shutdown_timeout_s=settings.grace_seconds,
            max_constructor_retry_count=STARTS,
            **scaling,
        )
        serve.start(proxy_location="Disabled")
        try:
            handle = serve.run(deployment.bind(bundle.absolute(), settings, batch), name=name, route_prefix=None)
        except RuntimeError as e:
            raise ReftError(
                f"no replica started ({_reason(name, e)}); the bundle, its adapters and reft-export are on every machine?"
            ) from e
        yield RayReplicas(handle)
    finally:
        with suppress(Exception):  # the cluster is gone
            serve.delete(name)
        ray.shutdown()


def _start(cluster: ClusterSettings, *, processors: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": "reft-export"}
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if cluster.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray's own switch: nothing is told to anybody
        # "local": RAY_ADDRESS, or a cluster that runs on this machine, would be joined else, and that takes no num_cpus.
        ray.init(address="local", num_cpus=processors, include_dashboard=False, **quiet)
        return
    host, _, port = cluster.address.rpartition(":")
    remedy = "start Ray there (`ray start --head`), or pass HOST:PORT of its head"
    if not host or not port.isdecimal():
        raise InputError(f"--ray-address is {cluster.address!r}, expected HOST:PORT; {remedy}")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=cluster.address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as e:
        raise ReftError(f"no Ray cluster answers at {cluster.address} ({str(e).splitlines()[0]}); {remedy}") from e


def _check_room(processors: int) -> None:
    there = int(ray.cluster_resources().get("CPU", 0))
    if there < processors:
        raise ReftError(
            f"the replicas take {processors} processors, and the cluster has {there}; lower --replicas or --threads, or start more machines"
        )


def _reason(name: str, error: RuntimeError) -> str:
    """The last line of what the replica's process said."""
    with suppress(Exception):
        told = serve.status().applications[name].deployments["Replica"].message
        lines = [line.strip() for line in told.splitlines() if "Error" in line or "error" in line]
        return lines[-1]
    return str(error).splitlines()[0]


def serve_cluster(
    bundle: Path,
    settings: ServeSettings,
    batch: BatchSettings,
    cluster: ClusterSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_start: Callable[[str], None] = lambda _: None,
) -> None:
    """As ``process.serve``, by replicas. Raises what ``replicas`` raises, and what opening the bundle does."""
    with closing(bind(host, port)) as bound:
        open_artifact(bundle)  # what cannot be opened here need not be tried there
        with replicas(bundle, settings, batch, cluster) as started:
            Running(*create_front(started, settings), bound, on_start).run(sockets=[bound])
