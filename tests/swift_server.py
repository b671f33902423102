"""OpenStack Swift from PyPI as a second S3 server: it keeps objects on disk and checks signatures, as moto does not.

    python tests/swift_server.py FOLDER PORT

It knows one user, ``KEY`` with ``SECRET``, listens on the loopback address, needs no root, and its processes end with
this one.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

MODULES = {"account": "account", "container": "container", "object": "obj"}
ACCOUNT, USER, SECRET = "testing", "key", "testing-secret"
KEY = f"{ACCOUNT}:{USER}"
REGION = "us-east-1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings(folder: Path, port: int) -> list[list[str]]:
    """Write one device's rings and the settings of the servers; return module and file of each, the proxy last."""
    from swift.common.ring import RingBuilder

    (folder / "disk" / "sda").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = x\nswift_hash_path_prefix = x\n")
    common = f"swift_dir = {folder}\ndevices = {folder}/disk\nmount_check = false\nworkers = 0\nbind_ip = 127.0.0.1\n"
    common += "log_address = /dev/null\nlog_level = WARNING\nfallocate_reserve = 0\ndisable_fallocate = true\n"
    servers = []
    for kind, module in MODULES.items():
        here = free_port()
        builder = RingBuilder(4, 1, 0)
        device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": here, "device": "sda", "weight": 1, "meta": ""}
        builder.add_dev(device | {"replication_ip": "127.0.0.1", "replication_port": here})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{kind}.ring.gz"))
        text = f"[DEFAULT]\n{common}bind_port = {here}\n[pipeline:main]\npipeline = {kind}-server\n"
        (folder / f"{kind}.conf").write_text(f"{text}[app:{kind}-server]\nuse = egg:swift#{kind}\n")
        servers.append([f"swift.{module}.server", str(folder / f"{kind}.conf")])
    layers = {
        "s3api": f"location = {REGION}\ncheck_bucket_owner = false\nallow_multipart_uploads = true",
        "tempauth": f"user_{ACCOUNT}_{USER} = {SECRET} .admin",
        "slo": "",
        "bulk": "",
        "listing_formats": "",
        "catch_errors": "",
    }
    text = f"[DEFAULT]\n{common}bind_port = {port}\n[pipeline:main]\n"
    text += "pipeline = catch_errors listing_formats bulk s3api tempauth slo proxy-server\n"
    text += "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\nallow_account_management = true\n"
    text += "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n{more}\n" for name, more in layers.items())
    (folder / "proxy.conf").write_text(text)
    return [*servers, ["swift.proxy.server", str(folder / "proxy.conf")]]


def main(folder: Path, port: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for words in settings(folder, port):
            servers.append(subprocess.Popen([sys.executable, "-m", *words, "-v"]))
        servers[-1].wait()
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
