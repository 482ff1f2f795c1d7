"""All targets, by their names."""

from tests.hostile import Target
from tests.hostile_folders import EXPORTS, MODELS, RUNS
from tests.hostile_media import AUDIO, IMAGES
from tests.hostile_samples import SAMPLES
from tests.hostile_tables import PARQUET
from tests.hostile_tensors import MANIFESTS, NPZ, SHARDS, TENSORS
from tests.hostile_texts import CAPTION_TABLES, DOCUMENTS, LIBRARIES, SPEECH_TABLES, TEXT_JSON
from tests.hostile_words import COMMAND_LINES, NAMED, RECIPES

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(TENSORS, SHARDS, MANIFESTS, NPZ, IMAGES, AUDIO),
        *(CAPTION_TABLES, SPEECH_TABLES, PARQUET, DOCUMENTS, TEXT_JSON, LIBRARIES),
        *(EXPORTS, RUNS, SAMPLES, MODELS, RECIPES, NAMED, COMMAND_LINES),
    )
}
