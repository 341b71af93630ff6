# Make (or update) the virtual environment and return the path of its python. Used by quickstart.ps1 and test.ps1.
#
#     $python = powershell -File scripts\setup_env.ps1          # .venv in the repository, for use
#     $python = powershell -File scripts\setup_env.ps1 dev      # with what the tests need
#
# $env:SELVA_VENV puts the environment elsewhere, $env:PYTHON chooses the interpreter (3.10 or newer).
param([string]$Extra = "")
$ErrorActionPreference = "Stop"
Set-Location (Join-Path $PSScriptRoot "..")

$venv = if ($env:SELVA_VENV) { $env:SELVA_VENV } else { Join-Path (Get-Location) ".venv" }
$bin = if ($IsLinux -or $IsMacOS) { "bin/python" } else { "Scripts\python.exe" }
$python = Join-Path $venv $bin
if (-not (Test-Path $python)) {
    $interpreter = if ($env:PYTHON) { $env:PYTHON } else { "python" }
    & $interpreter -c "import sys; sys.exit(sys.version_info < (3, 10))"
    if ($LASTEXITCODE -ne 0) { throw "$interpreter is older than Python 3.10, or not there; set `$env:PYTHON" }
    [Console]::Error.WriteLine("making a virtual environment in $venv")
    & $interpreter -m venv $venv
    if ($LASTEXITCODE -ne 0) { throw "the virtual environment could not be made" }
}
# The stamp remembers which setup.py was installed with which extras, so that a second run starts at once.
$stamp = Join-Path $venv $(if ($Extra) { ".installed-$Extra" } else { ".installed" })
$wanted = (Get-Content setup.py, pyproject.toml -Raw) + "$Extra $(Get-Location)" -join ""
if (-not (Test-Path $stamp) -or (Get-Content $stamp -Raw).Trim() -ne $wanted.Trim()) {
    [Console]::Error.WriteLine("installing the package and its dependencies (a few minutes)")
    $target = if ($Extra) { ".[$Extra]" } else { "." }
    & $python -m pip install -qq --disable-pip-version-check --editable $target
    if ($LASTEXITCODE -ne 0) { throw "the installation failed" }
    Set-Content -Path $stamp -Value $wanted -Encoding UTF8
}
Write-Output $python
