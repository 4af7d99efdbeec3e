"""Forecasts how much of a run's network will run in integers; trains nothing."""

import copy

import torch
from omegaconf import DictConfig

from qat_tricks.deploy.cost.forecast import Forecast, forecast
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.workbench import Workbench
from qat_tricks.jobs.classifier import make_classifier
from qat_tricks.jobs.datamodule import load_data
from qat_tricks.jobs.fitted_recipe import fitted_recipe
from qat_tricks.tricks.quantize import Quantize


def forecast_job(config: DictConfig) -> Forecast:
    """Forecasts the integer coverage of a composed config; nothing is trained or written.

    Raises:
        QatTricksError: the input is bad, the network cannot be traced, or the recipe does not
            quantize.
    """
    recipe = fitted_recipe(config)
    if not any(isinstance(trick, Quantize) for trick in recipe.tricks):
        raise QatTricksError(
            f"recipe {config.recipe.name} does not quantize: forecast=true has nothing to forecast"
        )
    data = load_data(config.data)
    network = copy.deepcopy(make_classifier(config, data).network).eval()
    # Only shapes matter. Two images, as an operation may treat one in its own way.
    images = torch.zeros(2, data.in_channels, *data.image_size)
    work = Workbench(network, lambda num_images: [images], untraced=recipe.untraced)
    # The recipe's own tricks prepare the network, so that the forecast cannot differ from the run.
    for trick in recipe.tricks:
        trick.restructure(work)
    return forecast(work.network, images)
