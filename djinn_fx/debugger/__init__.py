"""The debugger: ``djinn-fx debug``, its commands with and without a screen."""
