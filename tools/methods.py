"""Every method in one table: its name, and its script with flags.

runs.sh, plan.py, report.py, bench.py and the tests read it. To add a method, add a row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    name: str  # in the names of runs, and in runs.sh: METHODS="DR DMAstar-SH"
    script: str  # path from the project's root
    flags: str = ""
    extra: bool = False  # an ablation, a variant or a relative: not part of the paper's main table

    @property
    def label(self):
        """The name as the paper writes it."""
        return self.name.replace("DMAstar", "DMA*")


METHODS = {
    method.name: method
    for method in (
        Method("DR", "dr_sac.py"),
        Method("Concat", "dr_sac.py", "--context-aware"),
        Method("DA", "da_sac.py"),
        Method("DMA", "dma_sac.py", "--mask-prob 0 --no-normalise"),
        Method("DMA-Pearl", "dma_sac.py", "--kl-beta 0.4"),
        Method("DMAstar", "dma_sac.py"),
        Method("DMAstar-SH", "dmash_sac.py"),
        # Not in the paper: they stand where it has Amago
        Method("RSAC", "rsac.py", extra=True),
        Method("RSAC-H", "rsac.py", "--hypernetwork", extra=True),
        Method("RSAC-H-biasinit", "rsac.py", "--hypernetwork --bias-init", extra=True),
        # Variants and ablations
        Method("Concat-scaled", "dr_sac.py", "--context-aware --scale-context", extra=True),
        Method("DA-scaled", "da_sac.py", "--scale-context", extra=True),
        Method("DMAstar-nomask", "dma_sac.py", "--mask-prob 0", extra=True),
        Method("DMAstar-nonorm", "dma_sac.py", "--no-normalise", extra=True),
        Method("DMAstar-H", "dmah_sac.py", extra=True),
        Method("DMAstar-H-RLonly", "dmah_sac.py", "--rl-only", extra=True),
        Method("DMA-SH", "dmash_sac.py", "--mask-prob 0 --no-normalise", extra=True),
        Method("DMAstar-SH-nomask", "dmash_sac.py", "--mask-prob 0", extra=True),
        Method("DMAstar-SH-nonorm", "dmash_sac.py", "--no-normalise", extra=True),
        Method("DMAstar-SH-nodetach-critic", "dmash_sac.py", "--no-detach-critic", extra=True),
        Method("DMAstar-SH-nodetach-actor", "dmash_sac.py", "--no-detach-actor", extra=True),
        Method(
            "DMAstar-SH-nodetach-critic-nodetach-actor",
            "dmash_sac.py",
            "--no-detach-critic --no-detach-actor",
            extra=True,
        ),
        # Relatives
        Method("HyperZero", "relatives/hyperzero.py", extra=True),
        Method("HyperZero-noQ", "relatives/hyperzero.py", "--no-q --no-td", extra=True),
        Method("HyperZero-noTD", "relatives/hyperzero.py", "--no-td", extra=True),
        Method("MLP", "relatives/hyperzero.py", "--model mlp --no-q --no-td", extra=True),
        Method("UVFA", "relatives/hyperzero.py", "--model mlp", extra=True),
        Method("HyperDynamics", "relatives/hyperdynamics.py", extra=True),
        Method("HyperDynamics-global", "relatives/hyperdynamics.py", "--model global", extra=True),
        Method("HyperDynamics-concat", "relatives/hyperdynamics.py", "--model concat", extra=True),
        Method("HyperDynamics-recurrent", "relatives/hyperdynamics.py", "--model recurrent", extra=True),
        Method("HyperDynamics-expert", "relatives/hyperdynamics.py", "--model expert", extra=True),
        # What the authors' public code does otherwise
        Method("DMAstar-SH-public", "relatives/dmash_public.py", extra=True),
        Method("DMAstar-SH-unchunked", "relatives/dmash_public.py", "--no-public-steps --unchunked", extra=True),
        Method("DMAstar-SH-public-unchunked", "relatives/dmash_public.py", "--unchunked", extra=True),
    )
}
