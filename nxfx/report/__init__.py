"""What nxfx did and what it found: locations, rewrites, findings and their renderings."""

from nxfx.report.certificate import Certificate, CertificateCase
from nxfx.report.findings import CODES, Finding, Severity
from nxfx.report.locations import Location, locate
from nxfx.report.report import Report
from nxfx.report.rewrites import Kind, Rewrite
from nxfx.report.sites import ValueSite

__all__ = ["CODES", "Certificate", "CertificateCase", "Finding", "Kind", "Location", "Report", "Rewrite", "Severity", "ValueSite", "locate"]
