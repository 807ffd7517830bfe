"""The report: one page of figures and tables that needs nothing else."""

from timm_synermix.report.evaluated import Evaluated
from timm_synermix.report.example_images import example_images
from timm_synermix.report.report import write_report

__all__ = ['Evaluated', 'example_images', 'write_report']
