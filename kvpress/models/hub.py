"""Whether the Hugging Face hub can be asked for a model, found out with one request."""

from kvpress.models.errors import ModelLoadError
from kvpress.models.names import choices


def check_reachable(name: str) -> None:
    """Refuse a model that is not in the hub's cache folder while the hub cannot be reached: the loader would try each file six times.

    Raises:
        ModelLoadError: no connection, or no answer in the hub's own time limit (`HF_HUB_ETAG_TIMEOUT`, 10 s).
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except (HfHubHTTPError, HFValidationError):
        return  # an answer, or a name that cannot be asked for: the loader says which
    except Exception as error:  # of the HTTP library, another one in each version of the hub's client
        raise ModelLoadError(
            f"model {name!r} is not in the hub's cache folder and the hub cannot be reached: {error} {choices(name)}"
        ) from error
