import os, shutil
from pathlib import Path
class CheckpointFiles:
    def __init__(self, root): self._root = Path(root)
    def _p(self, uid, n): return self._root / uid / f"{n}.safetensors"
    def write(self, uid, number, data):
        p = self._p(uid, number); p.parent.mkdir(parents=True, exist_ok=True)
        t = p.with_suffix(".writing"); t.write_bytes(data); t.replace(p)
    def read(self, uid, number): return self._p(uid, number).read_bytes()
    def delete(self, uid, number): self._p(uid, number).unlink(missing_ok=True)
    def delete_all(self, uid): shutil.rmtree(self._root / uid, ignore_errors=True)
