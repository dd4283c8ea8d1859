"""A simulated host and a simulated card, of 8 GiB each."""

import os

import pynvml

KIB, MIB, GIB = 2**10, 2**20, 2**30


class Card:
    """Replacement for torch.cuda with 8 GiB: 3 free, 2 reserved by this process, and 1 of those allocated."""

    def __init__(self):
        self.integrated, self.fractions, self.nvml = 0, [], {}
        self.live, self.peak, self.held, self.free = GIB, 2 * GIB, 2 * GIB, 3 * GIB

    def counters(self, device):
        assert device == 0
        allocated = {"current": self.live, "peak": self.peak, "allocated": 9, "freed": 9}
        return {"allocated_bytes": {"all": allocated}, "reserved_bytes": {"all": {"current": self.held}}}

    def reset(self, device):
        self.peak = self.live

    def ask(self, question, *arguments):
        if question not in self.nvml:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self.nvml[question]


def limit_group(folder, limit_bytes, used_bytes, cache_bytes, names=("memory.max", "memory.current", "inactive_file")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit_bytes}\n")
    (folder / names[1]).write_text(f"{used_bytes}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache_bytes}\n")


def have_a_worker(memory, mib):
    """Let process 11 be a child of this process, with so much memory."""
    for name, text in {
        "self/stat": "10 (python) S 1",
        "11/stat": "11 (python) S 10",
        "11/statm": f"1 {mib * MIB // os.sysconf('SC_PAGE_SIZE')} 1",
        "11/smaps_rollup": f"Pss: {mib * KIB} kB\nPrivate_Dirty: {mib * KIB} kB\n",
    }.items():
        (memory.proc / name).parent.mkdir(exist_ok=True)
        (memory.proc / name).write_text(text)
