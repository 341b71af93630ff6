# test.sh for PowerShell: install, then run linter, type checker and tests. Arguments go to pytest:
#
#     powershell -ExecutionPolicy Bypass -File scripts\test.ps1
#     powershell -ExecutionPolicy Bypass -File scripts\test.ps1 tests\test_flow.py
$ErrorActionPreference = "Stop"
Set-Location (Join-Path $PSScriptRoot "..")
$python = & (Join-Path $PSScriptRoot "setup_env.ps1") dev
& $python -m ruff check .
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
& $python -m basedpyright --pythonpath $python
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
& $python -m pytest @args
exit $LASTEXITCODE
