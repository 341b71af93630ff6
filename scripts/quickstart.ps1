# quickstart.sh for PowerShell: install, then teach the built-in model a sound and write a page about it.
#
#     powershell -ExecutionPolicy Bypass -File scripts\quickstart.ps1
#     powershell -ExecutionPolicy Bypass -File scripts\quickstart.ps1 --fast
#
# The options are those of quickstart.py.
$ErrorActionPreference = "Stop"
Set-Location (Join-Path $PSScriptRoot "..")
$python = & (Join-Path $PSScriptRoot "setup_env.ps1")
& $python scripts/quickstart.py @args
exit $LASTEXITCODE
