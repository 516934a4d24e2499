"""A tracker for tests: it stands where a library would, and a server that holds what it was given."""

from sdft_ray.trackers.libraries import UnknownRun


class Server:
    """What a tracker's server would hold: runs by key, and how it fails."""

    def __init__(self):
        self.runs, self.statuses, self.down, self.takes = {}, [], False, 10**6

    def make(self, name):
        return FakeTracker(self)


class FakeTracker:
    """Stands where a library would."""

    def __init__(self, server: Server):
        self.server = server

    def call(self) -> None:
        self.server.takes -= 1
        if self.server.down or self.server.takes < 0:
            raise ConnectionError("HTTPConnectionPool:\nconnection refused")

    def start(self, run, key):
        self.call()
        if key and key not in self.server.runs:
            raise UnknownRun
        self.key = key or f"run-{len(self.server.runs)}"
        self.server.runs.setdefault(self.key, [])
        return self.key

    def log(self, step, metrics):
        self.call()
        self.server.runs[self.key].append((step, dict(metrics)))

    def artifact(self, file):
        self.server.runs[self.key].append(file.name)

    def finish(self, status):
        self.server.statuses.append(status)
