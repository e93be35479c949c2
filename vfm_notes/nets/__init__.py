"""Networks, and the operator that the three-dimensional ones share."""


def __getattr__(name):
    "`depthwise_conv3d` without importing torch before it is asked for."
    if name != "depthwise_conv3d": raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .convnext3d import depthwise_conv3d
    return depthwise_conv3d
