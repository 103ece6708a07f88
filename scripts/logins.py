"""Whether trackers and the hub will take what a run gives them, asked without beginning anything there."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from configs.errors import UserError
from configs.options import Config

Look = Callable[[], tuple[str, None]]


def wanted(config: Config) -> list[tuple[str, Look]]:
    """A name and a look for each service that the config uses."""
    looks: list[tuple[bool, str, Look]] = [
        (config.use_tensorboard, "TensorBoard", tensorboard_found),
        (config.use_wandb, "W&B", wandb_found),
        (config.push_to_hub, "hub", lambda: hub_found(str(config.hub_model_id))),
    ]
    return [(name, look) for asked, name, look in looks if asked]


def tensorboard_found() -> tuple[str, None]:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise UserError(f"TensorBoard cannot be imported: {error}", fix="pip install tensorboard") from None
    return "it can be imported", None


def wandb_found() -> tuple[str, None]:
    """A key, or a mode that needs none."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"wandb cannot be imported: {error}", fix="pip install wandb") from None
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return f"wandb {wandb.__version__}, WANDB_MODE={mode}: nothing is sent", None
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or in_netrc(host):
        return f"wandb {wandb.__version__}, there is a key for {host}", None
    raise UserError(f"there is no key for {host}", fix="`wandb login`, or set WANDB_MODE=offline")


def in_netrc(host: str) -> bool:
    """Whether the file where `wandb login` keeps its key has one."""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def hub_found(repository: str) -> tuple[str, None]:
    """Who the hub takes us for, and whether that one may write there, as far as the token tells."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: nothing can be pushed", fix="unset it, or leave out --push_to_hub")
    if get_token() is None:
        raise UserError("there is no token for the hub", fix="log in with `hf auth login`")
    try:
        me = HfApi().whoami()
    except Exception as error:  # of the network, the hub or the token
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"the hub does not know you: {first_line}", fix="log in with `hf auth login`") from None
    name, role = me["name"], me.get("auth", {}).get("accessToken", {}).get("role", "unknown")
    if role == "read":
        raise UserError(f"the token of {name} may read only", fix="make one with write access and `hf auth login`")
    owner = repository.split("/")[0] if "/" in repository else name
    if owner not in [name, *(one["name"] for one in me.get("orgs", []))]:
        raise UserError(
            f"you are {name}, and {repository} belongs to {owner}",
            fix=f"--hub_model_id {name}/{repository.split('/')[-1]}, or log in as a member of {owner}",
        )
    rights = "may write" if role == "write" else f"has a token of kind {role}, whose rights are not looked at"
    return f"{name} {rights}: {repository}", None
