"""The effects: processes, devices, files. Imports `megafn.pure`; is never imported by it."""
