ARCHITECTURES = {"dflash": "DFlashDraftModel", "dspark": "Qwen3DSparkModel"}


def algorithm(config):
    return next(k for k, v in ARCHITECTURES.items() if [v] == config["architectures"])


def mask_token_id(config):
    return config["dflash_config"]["mask_token_id"]


def causal_layers(config):
    if "is_causal" in config:
        return [config["is_causal"]] * config["num_hidden_layers"]
    return [k == "sliding_attention" for k in config["layer_types"]]
