def add_flags(add):
    add("--algorithm", default="dflash")
