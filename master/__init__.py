"""The master daemon, imported as `alluxiofuse.master` (see setup.cfg)."""

if __name__ != "alluxiofuse.master":
    raise ImportError(
        "import alluxiofuse.master: a second copy of every class would follow from the bare name"
    )
