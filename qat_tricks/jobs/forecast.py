"""The forecast of one run: how much of its network will run in integers, without training it."""

import torch
from omegaconf import DictConfig

from qat_tricks.deploy.cost.forecast import Forecast, forecast
from qat_tricks.errors import QatTricksError
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
    settings = [trick.settings for trick in recipe.tricks if isinstance(trick, Quantize)]
    if not settings:
        raise QatTricksError(
            f"recipe {config.recipe.name} does not quantize: forecast=true has nothing to forecast"
        )
    data = load_data(config.data)
    network = make_classifier(config, data).network
    image = torch.zeros(1, data.in_channels, *data.image_size)
    # of several quantize tricks the last one decides
    return forecast(network, image, settings[-1], recipe.whole)
