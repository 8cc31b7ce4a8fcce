"""
Loads a saved folder with `trust_remote_code`, runs it and saves it again, while Python reports what is done to files,
processes, pickles and the network. Prints JSON: the events by kind, each with what it was about.

python audit_saved_folder.py FOLDER COPY     COPY: where everything is saved again
"""

import json
import os
import sys

import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGING = {"os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1}
STARTING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
events: dict[str, list[str]] = {"files": [], "network": [], "processes": [], "pickles": []}


def watch(event: str, args: tuple):
    if event == "open":
        path, mode, flags = args
        if not isinstance(path, int) and (flags & WRITING if mode is None else set(mode) & set("wxa+")):
            events["files"].append(os.path.abspath(os.fsdecode(path)))
    elif event in CHANGING:
        events["files"].append(os.path.abspath(os.fsdecode(args[CHANGING[event]])))
    elif event.startswith("socket."):
        events["network"].append(f"{event} {args[1:]}")
    elif event in STARTING:
        events["processes"].append(f"{event} {args[0]}")
    elif event == "pickle.find_class":
        events["pickles"].append(".".join(args))


folder, copy = sys.argv[1:]
image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
sys.addaudithook(watch)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
with torch.no_grad():
    model(**image_processor(image, return_tensors="pt"))
model(**image_processor(image, return_tensors="pt"), labels=torch.tensor([0])).loss.backward()
pipeline("image-classification", model=folder, trust_remote_code=True)(image)
model.save_pretrained(copy)
image_processor.save_pretrained(copy)
print("EVENTS " + json.dumps(events))
