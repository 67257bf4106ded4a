# shellcheck shell=bash
# What the scripts of this folder share. They need PostgreSQL 18's own programs, gzip or zstd, and Debian's usual ones.
#
# BACKUP_DIRECTORY    where backups are kept; it must exist (/backup)
# BACKUP_COMPRESSION  gzip or zstd (gzip)
# BACKUP_KEEP_DAYS    how many days dumps are kept (30)
# BACKUP_CHAIN_DAYS   after how many days a full physical backup begins a new chain (7)
# BACKUP_KEEP_CHAINS  how many chains are kept, with the WAL since the first of them (2)
#
# The database is that of DATABASE_URL or of DB_HOST, DB_PORT, DB_NAME, DB_USER and DB_PASSWORD, as for the service,
# or of libpq's own variables. DATABASE_URL_FILE, DATABASE_PASSWORD_FILE and DB_PASSWORD_FILE name files instead.
set -euo pipefail
umask 077
export LC_ALL=C PGCONNECT_TIMEOUT=${PGCONNECT_TIMEOUT:-10} PGAPPNAME=${PGAPPNAME:-orchestrator backup}
unset PGOPTIONS PGTZ PGDATESTYLE

root=${BACKUP_DIRECTORY:-/backup}
compression=${BACKUP_COMPRESSION:-gzip}
database=()   # arguments that name it
kind='' began='' problem=''
partial=()    # what is removed if this script fails

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

die() {
    problem=$1
    say "$1"
    exit "${2:-1}"
}

# The line of a program's messages that says what is wrong.
reason() { grep -m 1 -iE 'error|fatal' <<<"$1" || tail -n 1 <<<"$1"; }

# Runs a program. If it fails, shows what it said, and ends with the reason.
run() {
    local told
    if ! told=$("$@" 2>&1 >/dev/null); then
        printf '%s\n' "$told" >&2
        die "$1 failed: $(reason "$told")"
    fi
}

whole_number() {
    [[ ${!1:-$2} =~ ^[1-9][0-9]{0,3}$ ]] || die "$1: expected a number from 1 to 9999, got ${!1}"
    printf %s "${!1:-$2}"
}

check_settings() {
    [[ $compression == gzip || $compression == zstd ]] || die "BACKUP_COMPRESSION: expected gzip or zstd, got $compression"
    # A volume that is not mounted must not be taken for an empty one.
    [[ -d $root ]] || die "BACKUP_DIRECTORY: $root is no directory; mount the volume for backups there, or create it"
}

# The value of a setting, or of the file that it is in.
secret() {
    local file=$1_FILE
    if [[ -z ${!file:-} ]]; then
        printf %s "${!1:-}"
    elif [[ -n ${!1:-} ]]; then
        die "$1 and $file are both set; set only one of them"
    else
        [[ -r ${!file} ]] || die "$file: cannot read the file ${!file}"
        printf %s "$(<"${!file}")"
    fi
}

decoded() {
    local escaped=${1//\\/\\\\}
    printf %b "${escaped//%/\\x}"
}

# Everybody can read the arguments of a process, so the password goes into the environment.
connect() {
    local url password user info='' rest
    url=$(secret DATABASE_URL)
    password=$(secret DATABASE_PASSWORD)
    [[ -n $password ]] || password=$(secret DB_PASSWORD)
    user=${DATABASE_USERNAME:-${DB_USER:-}}
    if [[ -n $url ]]; then
        [[ $url =~ ^(jdbc:)?postgres(ql)?://(([^/?]*)@)?(.*)$ ]] ||
            die 'DATABASE_URL: expected postgresql://USER@HOST:PORT/DATABASE'
        info=${BASH_REMATCH[4]} rest=${BASH_REMATCH[5]}
        if [[ $info == *:* ]]; then
            password=$(decoded "${info#*:}")
            info=${info%%:*}
        fi
        if [[ $rest =~ ^(.*[?\&])password=([^\&]*)\&?(.*)$ ]]; then
            password=$(decoded "${BASH_REMATCH[2]}")
            rest=${BASH_REMATCH[1]}${BASH_REMATCH[3]}
        fi
        database=(-d "postgresql://${info:+$info@}$rest")
    else
        [[ -z ${DB_HOST:-} ]] || export PGHOST=$DB_HOST
        [[ -z ${DB_PORT:-} ]] || export PGPORT=$DB_PORT
        [[ -z ${DB_NAME:-} ]] || export PGDATABASE=$DB_NAME
    fi
    [[ -z $user ]] || export PGUSER=$user
    [[ -z $password ]] || export PGPASSWORD=$password
}

# The answer to a query, whose variables follow it: query "select :'a'" a=1
query() {
    local statement=$1 variables=()
    shift
    for each in "$@"; do variables+=(-v "$each"); done
    psql -X -A -t -q -w "${database[@]}" -v ON_ERROR_STOP=1 "${variables[@]}" <<<"$statement"
}

# Takes the lock of a kind of work in BACKUP_DIRECTORY. Programs started later share it: if this script is killed, the
# next one is refused until what it has left running has ended.
lock() {
    exec 9>"$root/.$1.lock"
    flock -n 9 || die "another ${2:-$1} is at work in $root; wait for it"
}

# From now on a failure is recorded in the database, and what is left half made is removed.
begin() {
    kind=$1
    began=$(query 'select clock_timestamp()') || die 'the database cannot be reached'
    trap finish EXIT
    trap 'die "it was interrupted" 143' INT TERM HUP
}

finish() {
    local status=$?
    trap - EXIT
    ((${#partial[@]} == 0)) || rm -rf -- "${partial[@]}" || true
    if ((status != 0)); then
        record '' '' "${problem:-it ended with $status}" || say 'this failure could not be recorded in the database'
    fi
    exit "$status"
}

# Records what begin() began: its bytes and place, or why it failed.
record() {
    query "select orchestrator.record_backup(:'kind', :'began', clock_timestamp(), nullif(:'bytes', '')::bigint
        , nullif(:'location', ''), nullif(:'problem', ''))" \
        "kind=$kind" "began=$began" "bytes=$1" "location=$2" "problem=$3" >/dev/null
}

# The time of the database, a second from now: nothing that was done before it is younger.
stamp() { query "select to_char(clock_timestamp() at time zone 'UTC' + interval '1 s', 'YYYYMMDD\"T\"HH24MISS\"Z\"')"; }

# A stamp with which nothing exists yet: `free_stamp SUFFIX PREFIX...`. Names have seconds, and are never used twice.
free_stamp() {
    local time prefix
    time=$(stamp) || return
    for prefix in "${@:2}"; do
        if [[ -e $prefix$time$1 ]]; then
            sleep 0.2
            free_stamp "$@"
            return
        fi
    done
    printf %s "$time"
}

bytes_of() { du -sb -- "$1" | cut -f 1; }

# Sends the content of a compressed file to standard output.
content() {
    case $1 in
        *.gz) gzip -dc -- "$1" ;;
        *.zst) zstd -dcq -- "$1" ;;
    esac
}

# Physical backups: base/CHAIN/BACKUP, where CHAIN is the name of its first, full backup, and a name is the time at
# which the backup was complete. Names that begin with a dot are not complete.
chains() { find "$root/base" -mindepth 1 -maxdepth 1 -type d -name '2*' 2>/dev/null | sort; }
backups_of() { find "$1" -mindepth 1 -maxdepth 1 -type d -name '2*' | sort; }

first_segment() { sed -n 's/^START WAL LOCATION: .*(file \([0-9A-F]\{24\}\))$/\1/p' "$1/backup_label"; }

segment_bytes() { pg_controldata -D "$1" | sed -n 's/^Bytes per WAL segment: *//p'; }

# Follows the archive of WAL from the first segment of a backup to its end, by its newest timeline. Sets wal_end, the
# last segment; and wal_gap, the first one that is missing before it, empty if none is. Fails if it cannot tell.
walk_wal() {
    local backup=$1 size per_log number last=-1 file name timeline newest=1 at expected
    local -A present=()
    local -a timelines=(1) begins=(0)
    wal_end='' wal_gap=''
    size=$(segment_bytes "$backup")
    per_log=$((4294967296 / size))
    for file in "$root"/wal/*.gz "$root"/wal/*.zst; do
        name=${file##*/}
        name=${name%.*}
        if [[ $name =~ ^[0-9A-F]{24}$|^[0-9A-F]{8}\.history$ ]]; then
            present[$name]=$file
            ((16#${name:0:8} <= newest)) || newest=$((16#${name:0:8}))
        fi
    done
    if ((newest > 1)); then
        name=$(printf '%08X.history' "$newest")
        [[ -n ${present[$name]:-} ]] || die "$root/wal: the timeline's file $name is missing"
        timelines=() begins=() at=0
        while read -r timeline file _; do
            [[ $timeline =~ ^[0-9]+$ && $file =~ ^([0-9A-F]+)/([0-9A-F]+)$ ]] || continue
            timelines+=("$timeline") begins+=("$at")
            at=$((16#${BASH_REMATCH[1]} * per_log + 16#${BASH_REMATCH[2]} / size))
        done < <(content "${present[$name]}")
        timelines+=("$newest") begins+=("$at")
    fi
    # The name of the segment with this number, on the timeline that recovery follows there.
    segment() {
        for ((at = ${#timelines[@]} - 1; at > 0; at--)); do ((begins[at] > $1)) || break; done
        printf -v expected '%08X%08X%08X' "${timelines[at]}" $(($1 / per_log)) $(($1 % per_log))
    }
    for name in "${!present[@]}"; do
        [[ $name != *.history ]] || continue
        number=$((16#${name:8:8} * per_log + 16#${name:16:8}))
        segment "$number"
        # shellcheck disable=SC2034 # the callers read wal_end and wal_gap
        if [[ $name == "$expected" ]] && ((number > last)); then last=$number wal_end=$name; fi
    done
    name=$(first_segment "$backup")
    for ((number = 16#${name:8:8} * per_log + 16#${name:16:8}; number <= last; number++)); do
        segment "$number"
        if [[ -z ${present[$expected]:-} ]]; then
            # shellcheck disable=SC2034
            wal_gap=$expected
            return
        fi
    done
}
