"""Replicas on Ray Serve: the application of one process, as often as there is to do, on one machine or many. Nothing else imports ray.

A replica is an actor with a session, a batch and the whole application; Ray starts it, restarts it and counts what runs on it. What
stands before them (runtimes/serving/front.py) runs where ``serve`` was called. Adapters are Ray's multiplexed models: of the replicas
with room, one that has the adapter in memory is preferred.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import ReplicaUnavailableError

from runtimes.errors import BundleError, InputError, ReftError
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
"""Times that a replica which does not start is tried where none does."""
FAILING_SECONDS = 10.0
"""That it is tried where others have started: Ray itself would go on for ever."""
FAILED, UNPLACED = "failed to start", "to be scheduled"
"""In what Ray Serve says of a deployment."""
NO_MACHINE = "No node info found"
"""In what Ray says where no process of the cluster runs beside this one."""
HEARD_SECONDS = 60.0
"""Within which the first replica is heard."""
FREE_SECONDS = 5.0
"""Within which processors of what has just ended are told to be free."""
PLACED_SECONDS = 120.0
"""That a replica is waited for once Ray Serve calls it slow."""
LESS = "lower --replicas or --threads, start more machines, or ask again later (`ray status` says what there is)"
EVERYWHERE = "the bundle, its adapters and reft-export are on every machine?"
CONNECT_SECONDS = 5.0
LOOK_SECONDS = 0.2
"""Between two looks at what starts."""


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """``least`` to ``most`` replicas, as many as there is to do; ``address`` of a Ray cluster's head, None: one of this machine's own."""

    least: int
    most: int
    address: str | None = None
    mean_seconds: float = 30.0
    """Over which what there is to do is averaged, above the 10 between two reports of it; all three are Ray Serve's own."""
    more_seconds: float = 30.0
    """That it asks for more replicas before there are."""
    fewer_seconds: float = 600.0
    """That it asks for fewer before one ends."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InputError(f"replicas are {self.least}-{self.most}, expected at least 1, and MIN at most MAX")


class Replica:
    """One process that answers."""

    def __init__(self, bundle: Path, weights: str, settings: ServeSettings, batch: BatchSettings) -> None:
        """``weights``: the digest of what the command opened. Raises ReftError, which names the machine, where it cannot answer alike."""
        self._closing = ExitStack()
        try:
            self._server = self._closing.enter_context(text_server(bundle, settings, batch))
            if self._server.bank.bundle.digest != weights:
                raise BundleError(f"{bundle} has other weights than where serve was called; copy that one there")
        except ReftError as e:
            self._closing.close()
            raise ReftError(f"machine {ray.util.get_node_ip_address()}: {e}") from e
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

    async def hello(self) -> AsyncGenerator[int, None]:
        yield os.getpid()

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

    async def hello(self) -> int:
        """The number of a replica's process. Raises ReplicaLost."""
        try:
            async for process in self.handle.options(stream=True, method_name="hello").remote():
                return process
        except LOST as e:
            raise ReplicaLost from e
        raise ReplicaLost


@contextmanager
def replicas(bundle: Path, settings: ServeSettings, batch: BatchSettings, cluster: ClusterSettings) -> Iterator[RayReplicas]:
    """Started, and ready; gone at the end. Raises ReftError where Ray does not answer, has too few processors, or no replica starts."""
    weights = open_artifact(bundle).digest  # what cannot be opened here need not be tried there
    batch = replace(batch, threads=batch.threads or (max(1, (os.cpu_count() or 1) // cluster.most) if cluster.address is None else 1))
    settings = replace(settings, max_body=settings.max_body + SEED_BYTES, adapters=settings.adapters and settings.adapters.absolute())
    _start(cluster, processors=cluster.most * (batch.threads or 1))
    name = f"reft-export-{secrets.token_hex(4)}"
    try:
        _check_room(cluster.least, batch.threads or 1)
        scaling: dict[str, Any] = {"num_replicas": cluster.least}
        if cluster.most > cluster.least:
            counts = {"min_replicas": cluster.least, "max_replicas": cluster.most, "target_ongoing_requests": batch.rows}
            delays = {"upscale_delay_s": cluster.more_seconds, "downscale_delay_s": cluster.fewer_seconds}
            scaling = {"autoscaling_config": {**counts, **delays, "look_back_period_s": cluster.mean_seconds}}
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
        application = deployment.bind(bundle.absolute(), weights, settings, batch)
        # Not serve.run: where one machine's replicas start and another one's cannot, it never returns.
        target = serve.RunTarget(target=application, name=name, route_prefix=None)
        [handle] = serve.run_many([target], wait_for_applications_running=False)
        _wait(name)
        started = RayReplicas(handle)
        asyncio.run(_hear(started))
        yield started
    finally:
        with suppress(Exception):  # the cluster is gone
            serve.delete(name)
        ray.shutdown()


def _start(cluster: ClusterSettings, *, processors: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": "reft-export"}
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # What Ray Serve asks a replica that is gone is told as a task that nobody waited for.
    logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], LOST)))
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
        remedy += "; one that asks for a token has RAY_AUTH_MODE=token set here, too"
        ray.init(address=cluster.address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as e:
        if NO_MACHINE in str(e.__cause__):
            here = f"`ray start --address={cluster.address}` first, or call serve on a machine that did"
            raise ReftError(f"this machine is none of the Ray cluster's at {cluster.address}; {here}") from e
        raise ReftError(f"no Ray cluster answers at {cluster.address} ({str(e).splitlines()[0]}); {remedy}") from e


def _check_room(replicas: int, threads: int) -> None:
    """A replica's threads are processors of one machine. Raises ReftError where there are none, or something else has them."""
    machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    room = sum(int(processors) // threads for processors in machines)
    there = f"the cluster, {len(machines)} machine(s) with {int(sum(machines))} processors"
    if room < replicas:
        raise ReftError(f"{there}, has room for {room} replicas of {threads} processors each, expected {replicas}; {LESS}")
    end = time.monotonic() + FREE_SECONDS
    while (free := int(ray.available_resources().get("CPU", 0))) < replicas * threads:
        if time.monotonic() > end:
            raise ReftError(f"{there}, has {free} free, expected {replicas * threads}: something else there has the others; {LESS}")
        time.sleep(LOOK_SECONDS)


def _wait(name: str) -> None:
    """Until all replicas that are asked for run. Raises ReftError where that does not come."""
    failing = waiting = None
    while True:
        application = serve.status().applications.get(name)
        if application is None:
            raise ReftError("no replica started (the cluster forgot them); its logs say why")
        if application.status == "RUNNING":
            return
        told = application.deployments.get("Replica")
        message = application.message if told is None else told.message
        running = 0 if told is None else sum(count for state, count in told.replica_states.items() if state == "RUNNING")
        if application.status == "DEPLOY_FAILED":
            raise ReftError(f"no replica started ({_reason(message)}); {EVERYWHERE}")
        if FAILED in message:
            failing = failing or time.monotonic()
            if running and time.monotonic() > failing + FAILING_SECONDS:
                raise ReftError(f"{running} replica(s) started, and another one did not ({_reason(message)}); {EVERYWHERE}")
        elif UNPLACED in message:  # a process that takes its time to start is told so, too
            waiting = waiting or time.monotonic()
            if time.monotonic() > waiting + PLACED_SECONDS:
                raise ReftError(f"{running} replica(s) started, and others found no machine with processors that are free; {LESS}")
        time.sleep(LOOK_SECONDS)


async def _hear(replicas: RayReplicas) -> None:
    """A replica calls this process with each message of an answer. Where a network or another RAY_AUTH_MODE forbids it, all would hang."""
    try:
        await asyncio.wait_for(replicas.hello(), HEARD_SECONDS)
    except ReplicaLost:
        raise ReftError("replicas started, and the first that was asked was lost; Ray's logs say why, memory may be short") from None
    except asyncio.TimeoutError:
        remedy = "its machines must reach this one at any port, and RAY_AUTH_MODE be the same of all and of serve"
        raise ReftError(f"replicas started, and were not heard within {HEARD_SECONDS:g} s; {remedy}") from None


def _reason(message: str) -> str:
    """The last line of what a replica's process said: its error, without its class where that is ours."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    return re.sub(r"^runtimes\.errors\.\w+: ", "", (errors or lines or ["Ray's logs say why"])[-1])


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
    with closing(bind(host, port)) as bound, replicas(bundle, settings, batch, cluster) as started:
        Running(*create_front(started, settings), bound, on_start).run(sockets=[bound])
