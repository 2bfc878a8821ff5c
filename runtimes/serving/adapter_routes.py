"""/v1/adapters: what there is, and with the admin token what comes and goes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Request, UploadFile
from fastapi.responses import Response

from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.bank import BankFull
from runtimes.bank_files import ListedAdapter
from runtimes.edits.adapter import CONFIG_FILE, PROBES_FILE, TENSOR_FILE
from runtimes.errors import InputError, ReftError
from runtimes.files.claims import remove
from runtimes.files.folders import atomic_folder, marker
from runtimes.serving.gate import RECORD
from runtimes.serving.refusals import Refusal, json_response
from runtimes.serving.server import TextServer


def adapter_routes(server: TextServer) -> APIRouter:
    router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

    @router.get("", summary="Every adapter")
    def adapters() -> Response:
        resident = set(server.bank.resident)
        return json_response({"object": "list", "data": [_told(each, each.name in resident) for each in server.bank.listed.values()]})

    @router.get("/{name}", summary="One adapter")
    def adapter(name: str) -> Response:
        return json_response(_told(_known(server, name), name in server.bank.resident))

    @router.put("/{name}", summary="Upload an adapter's files", status_code=201)
    def upload(
        request: Request,
        name: str,
        config: Annotated[UploadFile, File(alias=CONFIG_FILE)],
        tensors: Annotated[UploadFile, File(alias=TENSOR_FILE)],
        probes: Annotated[UploadFile | None, File(alias=PROBES_FILE)] = None,
        replace: bool = False,
    ) -> Response:
        request.scope[RECORD]["adapter"] = _checked(name)
        files = {CONFIG_FILE: config, TENSOR_FILE: tensors, **({} if probes is None else {PROBES_FILE: probes})}
        with server.changing(name):
            there = name in server.bank
            put(server, name, files, replace=replace)
        return json_response(_told(_known(server, name), name in server.bank.resident), 200 if there else 201)

    @router.delete("/{name}", summary="Delete an adapter")
    def delete(request: Request, name: str) -> Response:
        request.scope[RECORD]["adapter"] = _checked(name)
        folder = _known(server, name).folder
        if folder is None:
            raise _of_the_bundle(name)
        with server.changing(name):
            server.bank.remove(name)
            _take_away(folder)
        return json_response({"id": name, "object": "adapter", "deleted": True})

    return router


def put(server: TextServer, name: str, files: dict[str, UploadFile], *, replace: bool) -> None:
    """Writes the adapter beside the others, whole or not at all, once it is known to fit the bundle; and lists it.

    Raises Refusal: 400 for files that are no adapter of this base, 403 where there is no folder, 409 for a name that is taken.
    """
    home, bank = server.settings.adapters, server.bank
    if home is None:
        raise Refusal(403, "adapters cannot be uploaded here: the server has no --adapters folder", code="no_folder")
    known = bank.listed.get(name)
    if known is not None and known.folder is None:
        raise _of_the_bundle(name)
    folder = home / name
    if folder.is_symlink():
        raise Refusal(409, f"adapter {name} is a link of the server's own; change it there", code="adapter_is_link")
    if known is not None and not replace:
        raise Refusal(409, f"there is an adapter {name} already; pass ?replace=true to replace it", code="adapter_exists")
    try:
        with atomic_folder(folder, force=replace) as work:
            for file, content in files.items():
                with (marker(work, file) if file == CONFIG_FILE else work / file).open("wb") as written:
                    shutil.copyfileobj(content.file, written)
            _check(server, name, work)
            if name in bank.resident:
                bank.evict(name)
        bank.add(folder, name)
    except BankFull:  # those that run have all the room; it is loaded when they have left
        bank.scan(home)
    except InputError as e:
        if known is None and folder.exists():
            raise Refusal(409, f"something that is no adapter is called {name} in the server's folder", code="adapter_exists") from e
        # Of whoever writes there, or of a folder that cannot be written: the server's own words, and paths.
        raise Refusal(409, f"adapter {name} cannot be written now; ask again, or ask who runs the server", code="adapter_busy") from e


def _check(server: TextServer, name: str, work: Path) -> None:
    """As the bank does when it loads one; raises Refusal 400, which names no path of this machine."""
    try:
        server.bank.check(ListedAdapter(name=name, size=0, folder=work))
    except ReftError as e:
        if PROBES_FILE in str(e) and not (work / PROBES_FILE).exists():
            raise Refusal(400, f"{CONFIG_FILE} lists probes; send {PROBES_FILE}, too", param=PROBES_FILE, code="missing_file") from e
        said = str(e).replace(str(work), name).replace(str(server.bank.bundle.folder), "the bundle")
        raise Refusal(400, said, code="invalid_adapter") from e


def _take_away(folder: Path) -> None:
    """Gone in one step: under another name first, which no scan lists."""
    if folder.is_symlink():
        folder.unlink()
        return
    hidden = folder.with_name(f".{folder.name}.deleted")
    remove(hidden)
    folder.rename(hidden)
    remove(hidden)


def _checked(name: str) -> str:
    try:
        return check_adapter_name(name)
    except ReftError as e:
        raise Refusal(400, str(e), param="name", code="invalid_name") from e


def _known(server: TextServer, name: str) -> ListedAdapter:
    listed = server.bank.listed.get(name)
    if listed is None:
        raise Refusal(404, f"there is no adapter {name!r}; GET /v1/adapters lists them", code="adapter_not_found")
    return listed


def _of_the_bundle(name: str) -> Refusal:
    return Refusal(409, f"adapter {name} is the bundle's own; `reft-export add` changes those", code="adapter_of_bundle")


def _told(each: ListedAdapter, resident: bool) -> dict[str, Any]:
    source = "bundle" if each.folder is None else "folder"
    return {"id": each.name, "object": "adapter", "bytes": each.size, "source": source, "resident": resident}
