"""Methods: how a selection is made. One file, one idea; ``METHODS`` maps ``pipeline.method`` to its ``select``."""

from hipexp.attention.methods import hip, streaming

METHODS = {"hip": hip.select, "streaming": streaming.select}
