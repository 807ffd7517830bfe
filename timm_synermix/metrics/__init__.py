"""Cohesion metrics: how tight and how far apart classes are in feature space, as torchmetrics."""

from timm_synermix.metrics.class_moments import (
    CDNV,
    CalinskiHarabasz,
    ClassTable,
    CosineCohesion,
    DaviesBouldin,
    FisherRatio,
    InterClassDistance,
    IntraClassDistance,
    MinInterClassDistance,
)
from timm_synermix.metrics.collection import (
    COHESION_MEMORY,
    METRIC_NAMES,
    Cohesion,
    CohesionMeter,
    cohesion_metrics,
    cohesion_place,
)
from timm_synermix.metrics.nc1 import NC1
from timm_synermix.metrics.silhouette import Silhouette

__all__ = [
    'CDNV',
    'COHESION_MEMORY',
    'METRIC_NAMES',
    'NC1',
    'CalinskiHarabasz',
    'ClassTable',
    'Cohesion',
    'CohesionMeter',
    'CosineCohesion',
    'DaviesBouldin',
    'FisherRatio',
    'InterClassDistance',
    'IntraClassDistance',
    'MinInterClassDistance',
    'Silhouette',
    'cohesion_metrics',
    'cohesion_place',
]
