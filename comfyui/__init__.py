"""Nodes for ComfyUI: what the command line does, in a graph; a folder for custom_nodes/, see docs/comfyui.md."""

try:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ModuleNotFoundError as error:
    raise ImportError(f"selva-lora lacks {error.name} in ComfyUI's Python: run `python -m pip install -e PATH` with "
                      "that Python and the path of the repository, and start ComfyUI again") from None

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
