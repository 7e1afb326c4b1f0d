"""Options, clocks, reports and tables of measurements. Must not know what is measured."""
