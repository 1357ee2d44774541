#!/usr/bin/env bash
# Images under the names that compose.yml asks for, where no image registry can be reached: made of Debian's packages.
# Run it as root, with debootstrap and a Docker engine. Then:
#
#   PYTHON_IMAGE=stand-in/python:3.11-slim python -m pytest -m slow tests/deploy/test_compose.py
#
# Grafana is not among Debian's packages, so nothing stands in for it.
set -euo pipefail
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What a Python image has: `python` and `pip` that may install beside the system's packages, and this machine's way out.
debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip bookworm "$work/root" "$mirror"
rm -f "$work"/root/usr/lib/python3*/EXTERNALLY-MANAGED
ln -sf python3 "$work/root/usr/bin/python"
cp /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/ca-certificates.crt"
changes=()
if [ -n "${PIP_FIND_LINKS:-}" ]; then
  mkdir -p "$work/root$PIP_FIND_LINKS" && cp "$PIP_FIND_LINKS"/* "$work/root$PIP_FIND_LINKS"
  changes+=(--change "ENV PIP_FIND_LINKS=$PIP_FIND_LINKS")
fi
tar -C "$work/root" -c . | docker import "${changes[@]}" - stand-in/python:3.11-slim

(cd "$work" && apt-get download prometheus && dpkg -x prometheus_*.deb prometheus)
docker build --tag prom/prometheus:v3.5.0 --file - "$work/prometheus" <<'DOCKERFILE'
FROM stand-in/python:3.11-slim
COPY usr/bin/prometheus /bin/prometheus
RUN install --directory --owner=nobody /prometheus
USER nobody
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
DOCKERFILE
