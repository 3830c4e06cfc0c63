#!/usr/bin/env bash
# Times work on an image that lies on a server, at several latencies, beside downloading it.
#
#   benches/remote.sh [LATENCY-IN-MS...]      (default 0 20 100)
#
# The image: a Debian (debootstrap, minbase) in an ext4 of 8 GiB, as four qcow2 layers. The server: one of a
# directory, on this machine, that waits before each answer.
#
#   tree       chainfs tree ADDRESS, without a mount
#   cat        chainfs cat ADDRESS/vm.qcow2:/root/etc/hostname, with an empty cache
#   mount      mounting with an empty cache, and the same file through the mount
#   ls         ls -lR of etc in that mount
#   again      a second mount with the same cache: the file, and ls -lR of etc
#   local      the same as again, of the store as a directory of this machine
#   download   all layers, by curl
#
# MiB and requests are what the server has sent, for mount and ls together.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need qemu-img qemu-io mke2fs curl python3
need_debian

tools=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")/target/tools
latencies=("$@")
[ $# -gt 0 ] || latencies=(0 20 100)
store=$SCRATCH/store
mnt=$SCRATCH/mnt
mkdir -p "$store" "$SCRATCH/root" "$mnt"
echo "making the image ..." >&2
tar --numeric-owner -C "$SCRATCH/root" -xf "$tools/debian.tar"
echo golden >"$SCRATCH/root/etc/hostname"
mke2fs -q -t ext4 -d "$SCRATCH/root" "$SCRATCH/disk" 8G
qemu-img convert -f raw -O qcow2 "$SCRATCH/disk" "$store/base.qcow2"
rm -r "$SCRATCH/root" "$SCRATCH/disk"
below=base
for layer in one two vm; do
    qemu-img create -q -f qcow2 -F qcow2 -b "$below.qcow2" "$store/$layer.qcow2"
    qemu-io -f qcow2 "$store/$layer.qcow2" -c "write -q -P 7 7G 32M" >/dev/null
    below=$layer
done
size=$(cat "$store"/*.qcow2 | wc -c)

cat >"$SCRATCH/server.py" <<'PYTHON'
import http.server, os, sys, time
root, latency = sys.argv[1], float(sys.argv[2]) / 1000
sent = requests = 0

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, code, body, **more):
        self.send_response(code)
        self.send_header("Content-Length", str(more.pop("length", len(body))))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        global sent, requests
        if self.path == "/counters":
            return self.reply(200, f"{requests} {sent}".encode())
        time.sleep(latency)
        requests += 1
        path = os.path.join(root, self.path.lstrip("/"))
        if os.path.isdir(path):
            names = "".join(f'<a href="{name}">x</a>' for name in os.listdir(path))
            return self.reply(200, names.encode(), Content_Type="text/html")
        if not os.path.exists(path):
            return self.reply(404, b"")
        found = os.stat(path)
        tag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
        if self.command == "HEAD":
            return self.reply(200, b"", length=found.st_size, ETag=tag)
        first, last = 0, found.st_size - 1
        if "Range" in self.headers:
            first, last = (int(word) for word in self.headers["Range"].split("=")[1].split("-"))
        with open(path, "rb") as file:
            file.seek(first)
            body = file.read(last - first + 1)
        sent += len(body)
        if "Range" in self.headers:
            return self.reply(206, body, ETag=tag, Content_Range=f"bytes {first}-{last}/{found.st_size}")
        self.reply(200, body, ETag=tag)

    do_HEAD = do_GET

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
PYTHON

# timed COMMAND...: seconds.
timed() {
    local begun=$EPOCHREALTIME
    "$@" >/dev/null || return
    awk -v a="$begun" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.2f", b - a }'
}
first_file() {
    "$CHAINFS" mount "$1" "$mnt" -o "cache_dir=$SCRATCH/cache" 2>/dev/null
    cat "$mnt/vm/files/active/root/etc/hostname"
}

echo
echo "$((size >> 20)) MiB in four layers, $(nproc) CPUs, kernel $(uname -r), $("$CHAINFS" --version); seconds"
echo
echo "| latency | tree | cat | mount | ls | requests | MiB (of all) | again | local | download |"
echo "|---|---|---|---|---|---|---|---|---|---|"
for latency in "${latencies[@]}"; do
    exec {port_of}< <(exec python3 "$SCRATCH/server.py" "$store" "$latency")
    SERVERS+=($!)
    server=$!
    read -r port <&"$port_of"
    address=http://127.0.0.1:$port
    rm -rf "$SCRATCH/cache"
    tree=$(timed "$CHAINFS" tree "$address" -o "cache_dir=$SCRATCH/cache")
    rm -rf "$SCRATCH/cache"
    cat=$(timed "$CHAINFS" cat "$address/vm.qcow2:/root/etc/hostname" -o "cache_dir=$SCRATCH/cache")
    rm -rf "$SCRATCH/cache"
    read -r requests_before sent_before < <(curl -s "$address/counters"; echo)
    mount=$(timed first_file "$address")
    list=$(timed ls -lR "$mnt/vm/files/active/root/etc/")
    read -r requests sent < <(curl -s "$address/counters"; echo)
    "$CHAINFS" umount "$mnt"
    again() { first_file "$1" && ls -lR "$mnt/vm/files/active/root/etc/"; }
    again=$(timed again "$address")
    "$CHAINFS" umount "$mnt"
    local=$(timed again "$store")
    "$CHAINFS" umount "$mnt"
    download=$(timed sh -c "for f in base one two vm; do curl -s '$address/'\$f.qcow2; done")
    sent=$((sent - sent_before))
    echo "| $latency ms | $tree | $cat | $mount | $list | $((requests - requests_before)) |" \
        "$((sent >> 20)) ($(awk -v a=$sent -v b="$size" 'BEGIN { printf "%.1f", a * 100 / b }') %) |" \
        "$again | $local | $download |"
    kill "$server"
done
