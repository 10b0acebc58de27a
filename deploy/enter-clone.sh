#!/bin/sh
# Run a command in a clone of the project, made of VDMINI_REPOSITORY where there is none yet.
set -eu
: "${VDMINI_REPOSITORY:?set it to the address of the git repository}"
: "${VDMINI_CLONE:?set it to the folder of the clone}"
if [ ! -d "$VDMINI_CLONE/.git" ]; then
    git clone --quiet "$VDMINI_REPOSITORY" "$VDMINI_CLONE"
fi
cd "$VDMINI_CLONE"
exec "$@"
