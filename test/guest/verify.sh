#!/bin/sh
# Checks an installed x-msrv as an operator would, and prints TAP: verify.sh [SECTION...], as root, on a system that
# boots systemd. Beside it: ends.py, aerospike_server.py, servers.py, nsqd. The repository that the package comes from
# is set up already; for `upgrade` it has an older version, too. It is for a system of its own: it removes and purges.
LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive MANPAGER=cat PAGER=cat SYSTEMD_PAGER=cat SYSTEMD_COLORS=0
export LC_ALL DEBIAN_FRONTEND MANPAGER PAGER SYSTEMD_PAGER SYSTEMD_COLORS
all='install man config timer daemon reload faults outage kill runit templates upgrade remove purge'
here=$(cd "$(dirname "$0")" && pwd)
work=/run/x-msrv-verify
conf=/etc/x-msrv/x-msrv.conf
units=/etc/systemd/system
mkdir -p "$work"
number=0 failed=0 store='' loader=''

# --------------------------------------------------------------------------------------------------------------- tools

# One test: what must hold, and the command that shows it.
t() {
    what=$1; shift; number=$((number + 1))
    : >"$work/said"
    if "$@" >>"$work/said" 2>&1; then
        echo "ok $number - $section: $what"
    else
        failed=$((failed + 1))
        echo "not ok $number - $section: $what"
        echo "# $*"
        tail -n 30 "$work/said" | sed 's/^/# /'
    fi
}

skip() { number=$((number + 1)); echo "ok $number - $section # SKIP $1"; }

# The only wait: until the command succeeds, for so many seconds. A subshell, for one may wait inside another.
within() (
    end=$(($(date +%s) + $1)); shift
    until "$@"; do
        [ "$(date +%s)" -lt "$end" ] || exit 1
        sleep 0.2
        : >"$work/said"
    done
)

not() { ! "$@"; }
exits() { expected=$1; shift; "$@"; [ $? = "$expected" ]; }
is() { echo "$1, expected $2"; [ "$1" = "$2" ]; }
says() { pattern=$1; shift; "$@" 2>&1 | tee "$work/words" | tail -n 20; grep -q -e "$pattern" "$work/words"; }

ends() { "$python" "$here/ends.py" "$@"; }
has() { is "$(ends records "$1")" "$2"; }            # so many records of a topic
done_with() { is "$(ends left "$1")" 0; }
all_stored() { has "$1" "$2" && done_with "$1"; }
show() { systemctl show --value -p "$1" "$2"; }
status() { systemctl status --no-pager --full "$1"; }
active() { is "$(show ActiveState "$1")" active; }
inactive() { is "$(show ActiveState "$1")" inactive; }
ready() { active "$1" && [ "$(show MainPID "$1")" != 0 ]; }
same() { is "$(show "$2" "$1")" "$3"; }              # a property of a unit

# Of the windows of a topic: none took more than N, all together took this many.
windows_of() {
    # shellcheck disable=SC2046
    set -- "$2" "$3" $(ends windows "$1")
    echo "$3 windows, at most $4 in one, $5 in all; expected at most $1, $2 in all"
    [ "$4" -le "$1" ] && [ "$5" = "$2" ]
}

# A whole file for a topic: configure FILE TOPIC MAX-MESSAGES.
configure() {
    cat >"$1" <<END
timeout = 5s
period = 2s
[nsq]
nsqd-tcp-address = 127.0.0.1:4150
topic = $2
max-messages = $3
msg-timeout = 3s
[aerospike]
hosts = 127.0.0.1:3000
namespace = test
END
    chown root:x-msrv "$1" && chmod 640 "$1"
}

misspell() { sed -i 's/^max-messages/max-massages/' $conf; }

# What `systemctl edit` writes; another period for a timer, as x-msrv(8) says.
edit_period() {
    mkdir -p "$units/$1.d"
    printf '[Timer]\nOnActiveSec=\nOnActiveSec=0\nOnUnitActiveSec=%s\n' "$2" >"$units/$1.d/override.conf"
    systemctl daemon-reload
}

# Nothing of ours runs, and no drop-in is left.
quiet() {
    systemctl disable --now x-msrv.timer x-msrv-daemon.service x-msrv@two.timer x-msrv-daemon@one.service
    systemctl stop x-msrv.service x-msrv@two.service
    systemctl reset-failed
    rm -rf "$units/x-msrv.timer.d" "$units/x-msrv@two.timer.d"
    systemctl daemon-reload
} >/dev/null 2>&1

# The queue and the store. Not before `install`, which may bring the Python that they need.
start_ends() {
    for each in 14 13 12 11 10; do
        [ ! -x "/usr/bin/python3.$each" ] || { python=/usr/bin/python3.$each; break; }
    done
    "$python" "$here/ends.py" store >"$work/store.log" 2>&1 & store=$!
    mkdir -p "$work/nsqd"
    "$here/nsqd" -data-path "$work/nsqd" -tcp-address 127.0.0.1:4150 -http-address 127.0.0.1:4151 \
        >"$work/nsqd.log" 2>&1 & nsqd=$!
    trap 'kill $store $nsqd $loader 2>/dev/null; wait; rm -rf "$work/nsqd"' EXIT
    t 'the queue and the store are up' within 20 ends_answer
}
ends_answer() { ends left none && ends records none; }
store_away() { kill -USR1 $store; within 10 not ends records none >/dev/null 2>&1; }
store_back() { kill -USR2 $store; within 10 ends records none >/dev/null 2>&1; }

# ------------------------------------------------------------------------------------------------------------- packages

if command -v dnf >/dev/null; then
    install() { dnf -y install "x-msrv${1:+-$1}"; }
    remove() { dnf -y remove x-msrv; }
    # dnf's counterpart is the operator's own hand.
    purge() { rm -rf /etc/x-msrv /var/lib/x-msrv /var/log/x-msrv /etc/sv/x-msrv; }
    versions() { dnf -q list --showduplicates x-msrv | awk '/^x-msrv/ { sub(/-.*/, "", $2); print $2 }' | sort -Vu; }
    installed() { rpm -q --qf '%{version}\n' x-msrv; }
    new_file=$conf.rpmnew
else
    install() { apt-get -y -q -o Dpkg::Options::=--force-confold install "x-msrv${1:+=$1*}"; }   # any revision
    remove() { apt-get -y -q remove x-msrv; }
    purge() { apt-get -y -q purge x-msrv; }
    versions() { apt-cache madison x-msrv | awk '{ sub(/-.*/, "", $3); print $3 }' | sort -Vu; }
    installed() { dpkg-query -W -f '${source:Upstream-Version}\n' x-msrv; }
    new_file=$conf.dpkg-dist
fi
newest() { versions | tail -n 1; }
previous() { versions | tail -n 2 | head -n 1; }

# All files, but for what package managers, the journal and others write of their own.
list_files() {
    find / -xdev \( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /dev -o -path /root -o -path "$here" \
        -o -path /var/cache -o -path /var/tmp -o -path /var/backups -o -path /var/log/journal -o -path /var/lib/systemd \
        -o -path /var/lib/apt -o -path /var/lib/dpkg -o -path /var/lib/rpm -o -path /var/lib/dnf \) -prune -o -print |
        grep -v -e '^/var/log/\(apt\|dpkg\|dnf\|hawkey\|alternatives\|btmp\|wtmp\|lastlog\)' \
            -e '^/etc/\(passwd\|group\|shadow\|gshadow\|.pwd.lock\|subuid\|subgid\)' \
            -e default-syslog | sort
}

# ------------------------------------------------------------------------------------------------------------- sections

do_install() {
    list_files >"$work/before"
    t 'the package manager installs it' install "$(newest)"
    t 'it is the newest version' is "$(installed)" "$(newest)"
    t 'it runs' says "^x-msrv $(newest)" x-msrv --version
    t 'its user is there' id x-msrv
    t 'root writes the configuration, the user reads it' is "$(stat -c '%U %G %a' $conf)" 'root x-msrv 640'
    t 'the state belongs to the user' is "$(stat -c '%U %G %a' /var/lib/x-msrv)" 'x-msrv x-msrv 750'
    for unit in x-msrv.timer x-msrv.service x-msrv-daemon.service; do
        t "$unit is known, and does not run" same $unit 'LoadState' loaded
        t "$unit is not started" inactive $unit
    done
    t 'nothing is enabled' not systemctl is-enabled --quiet x-msrv.timer x-msrv-daemon.service
    t 'nothing is supervised by runit' not test -e /etc/service/x-msrv
    t 'bytecode is there' test -n "$(find /usr/share/x-msrv/__pycache__ -name 'xmsrv.*.pyc' | head -n 1)"
    t 'that of its libraries, too' test -n "$(find /usr/lib/x-msrv/tornado/__pycache__ -name 'ioloop.*.pyc' | head -n 1)"
}

do_man() {
    t 'man x-msrv shows the program' says '^ *x-msrv .*JSON *messages' man x-msrv
    t 'man x-msrv.conf shows the options' says 'max-messages' man x-msrv.conf
}

# The lines that one edits, in the file that came.
do_config() {
    t 'the file that came is right' x-msrv check
    t 'a misspelt option is refused, and the right one named' says 'max-messages' \
        exits 78 x-msrv --set nsq.max-massages=1 check
    sed -i -e 's/^topic = .*/topic = config/' -e 's/^max-messages = .*/max-messages = 10/' $conf
    t 'it keeps owner and mode' is "$(stat -c '%U %G %a' $conf)" 'root x-msrv 640'
    t 'check --connect reaches both ends' x-msrv check --connect
    ends publish config 15
    t 'a window by hand takes N' says 'received 10, stored 10,' x-msrv once
    t 'the next takes the rest' says 'received 5, stored 5,' x-msrv once
    t 'all are records' all_stored config 15
    t 'the state that root left is the user'\''s' is "$(find /var/lib/x-msrv ! -user x-msrv)" ''
    store_away
    t 'without a store, check --connect says so' exits 69 x-msrv check --connect
    store_back
}

do_timer() {
    configure $conf timer 10
    edit_period x-msrv.timer 3s
    t 'it is enabled and started' systemctl enable --now x-msrv.timer
    t 'it is active' active x-msrv.timer
    t 'its first window starts at once' within 10 not same x-msrv.service InvocationID ''
    ends publish timer 10
    t 'messages are records within two periods' within 6 has timer 10
    ends publish timer 35
    t 'more than N become records, too' within 20 has timer 45
    t 'no window took more than N' within 5 windows_of timer 10 45
    t 'none is left' within 10 done_with timer
    t 'the summary is in the journal, by topic' says 'received 10, stored 10, deleted 0, duplicate 0' journalctl XMSRV_TOPIC=timer
    t 'windows without messages leave no lines' silent_windows
    t 'it is disabled and stopped' systemctl disable --now x-msrv.timer
}

# A window more, without a line in the journal about it. (systemd 262 misses a controller where a guest has none.)
silent_windows() {
    lines=$(lines_of x-msrv.service) started=$(show InvocationID x-msrv.service)
    within 10 not same x-msrv.service InvocationID "$started" && within 10 inactive x-msrv.service
    is "$(lines_of x-msrv.service)" "$lines"
}
lines_of() { journalctl -q -u "$1" | grep -vc 'pids.max'; }

do_daemon() {
    configure $conf daemon 10
    systemctl start x-msrv.timer
    t 'it starts' systemctl start x-msrv-daemon
    t 'it is active' ready x-msrv-daemon
    t 'the timer makes room for it' within 5 inactive x-msrv.timer
    ends publish daemon 25
    t 'messages become records' within 10 all_stored daemon 25
    t 'no window took more than N' within 5 windows_of daemon 10 25
    t 'its status is the last summary' within 10 says 'received' show StatusText x-msrv-daemon
    t 'it runs as the user' is "$(stat -c %U "/proc/$(show MainPID x-msrv-daemon)")" x-msrv
    t 'the watchdog is on' not same x-msrv-daemon WatchdogUSec 0
    t 'it stops' systemctl stop x-msrv-daemon
    t 'of its own will' same x-msrv-daemon Result success
    t 'systemd warns of nothing in its units' not says 'x-msrv.*\.service:[0-9]*:' journalctl -b _PID=1
}

do_reload() {
    configure $conf reload-a 10
    systemctl start x-msrv-daemon
    pid=$(show MainPID x-msrv-daemon)
    configure $conf reload-b 10
    t 'a good file is reloaded' systemctl reload x-msrv-daemon
    ends publish reload-b 5
    t 'it is in force' within 15 all_stored reload-b 5
    misspell
    t 'a bad file makes the reload fail' not systemctl reload x-msrv-daemon
    t 'the journal says what is wrong' within 5 says 'max-massages' journalctl -q -t x-msrv -b
    ends publish reload-b 5
    t 'the old one stays in force' within 15 all_stored reload-b 10
    t 'a bad file and a HUP by hand are reported' kill -HUP "$pid"
    t 'in full' within 10 says 'keeping the current configuration' journalctl -q -u x-msrv-daemon -b
    t 'it is the same process' same x-msrv-daemon MainPID "$pid"
    systemctl stop x-msrv-daemon
}

do_faults() {
    configure $conf faults 10
    misspell
    t 'the daemon refuses a bad file' not systemctl start x-msrv-daemon
    t 'it has failed' within 10 same x-msrv-daemon ActiveState failed
    t 'with the status of a fault in the configuration' same x-msrv-daemon ExecMainStatus 78
    t 'systemctl status shows it' says 'status=78' status x-msrv-daemon
    t 'and what is wrong' says 'max-massages' status x-msrv-daemon
    t 'the journal has the option and the nearest name' says 'max-massages.*max-messages' journalctl -u x-msrv-daemon -b
    t 'it is not started again' same x-msrv-daemon NRestarts 0
    t 'the timer'\''s service refuses it' not systemctl start x-msrv.service
    t 'with the same status' says 'status=78' status x-msrv.service
    edit_period x-msrv.timer 2s
    systemctl start x-msrv.timer
    t 'the timer goes on' active x-msrv.timer
    configure $conf faults 10
    ends publish faults 5
    t 'and when the file is mended, messages become records' within 10 all_stored faults 5
    systemctl stop x-msrv.timer
    t 'the daemon starts, too' systemctl start x-msrv-daemon
    systemctl stop x-msrv-daemon
}

do_outage() {
    configure $conf outage 10
    store_away
    t 'the daemon starts without a store' systemctl start x-msrv-daemon
    ends publish outage 5
    t 'its status says what it waits for' within 20 says '127.0.0.1:3000' show StatusText x-msrv-daemon
    t 'systemctl status shows it' says 'Status: .*127.0.0.1:3000' status x-msrv-daemon
    t 'the unit is active' ready x-msrv-daemon
    t 'the journal says so' says '127.0.0.1:3000' journalctl -q -p warning XMSRV_TOPIC=outage
    t 'no message is lost' is "$(ends left outage)" 5
    store_back
    t 'when it is back, messages become records' within 45 all_stored outage 5
    store_away
    ends publish outage 5
    t 'it goes away under a running daemon' within 20 says '127.0.0.1:3000' show StatusText x-msrv-daemon
    store_back
    t 'and is back' within 45 all_stored outage 10
    t 'nothing was restarted' same x-msrv-daemon NRestarts 0
    systemctl stop x-msrv-daemon
    edit_period x-msrv.timer 2s
    store_away
    systemctl start x-msrv.timer
    ends publish outage 5
    t 'a window without a store fails' within 20 says 'status=\(69\|75\)' status x-msrv.service
    t 'the timer is active' active x-msrv.timer
    store_back
    t 'and a later window stores all' within 20 all_stored outage 15
    systemctl stop x-msrv.timer
}

do_kill() {
    configure $conf kill 0
    systemctl start x-msrv-daemon
    load kill
    for each in 1 2; do
        t "under load, before SIGKILL $each" grows kill
        kill -9 "$(show MainPID x-msrv-daemon)"
        t "systemd starts it again" within 20 same x-msrv-daemon NRestarts $each
        t "it is active again" within 10 ready x-msrv-daemon
    done
    unload
    t 'nothing is lost, nothing doubled' within 30 all_stored kill "$sent"
    systemctl stop x-msrv-daemon
    edit_period x-msrv.timer 2s
    load kill-once
    configure $conf kill-once 0
    systemctl start x-msrv.timer
    t 'a window takes messages' grows kill-once
    t 'its process is found' within 10 ready_once
    kill -9 "$(show MainPID x-msrv.service)"
    unload
    t 'what a killed window held comes again' within 30 all_stored kill-once "$sent"
    systemctl stop x-msrv.timer
}

ready_once() { [ "$(show MainPID x-msrv.service)" != 0 ]; }
more() { [ "$(ends records "$1")" -gt "$2" ]; }
grows() { within 20 more "$1" "$(ends records "$1")"; }
load() { rm -f "$work/enough"; "$python" "$here/ends.py" load "$work/enough" "$@" >"$work/sent" & loader=$!; }
unload() { touch "$work/enough"; wait $loader; sent=$(cat "$work/sent"); }

do_runit() {
    if ! command -v sv >/dev/null || ! systemctl is-active --quiet runit; then skip 'no runit here'; return; fi
    # On EL it is documentation: copied, as README says.
    [ -d /etc/sv/x-msrv ] || { mkdir -p /etc/sv && cp -R /usr/share/doc/x-msrv/runit /etc/sv/x-msrv; }
    configure $conf runit-a 10
    ln -s /etc/sv/x-msrv /etc/service/
    t 'runsvdir takes it up' within 15 says '^run: x-msrv' sv status x-msrv
    ends publish runit-a 5
    t 'messages become records' within 15 all_stored runit-a 5
    t 'it runs as the user' is "$(stat -c %U "/proc/$(cat /etc/service/x-msrv/supervise/pid)")" x-msrv
    t 'it has a log' within 10 says 'received 5, stored 5' cat /var/log/x-msrv/current
    configure $conf runit-b 10
    t 'sv hup reads the file again' sv hup x-msrv
    ends publish runit-b 5
    t 'which is in force then' within 15 all_stored runit-b 5
    t 'sv stop ends it' sv -w 60 stop x-msrv
    t 'its status is down' says '^down: x-msrv' sv status x-msrv
    t 'sv start' sv -w 10 start x-msrv
    ends publish runit-b 5
    t 'goes on' within 15 all_stored runit-b 10
    sv -w 60 stop x-msrv
    t 'sv once' sv once x-msrv
    ends publish runit-b 5
    t 'is the daemon, too' within 15 all_stored runit-b 15
    t 'that ends' sv -w 60 term x-msrv
    t 'and is not started again' within 10 says '^down: x-msrv' sv status x-msrv
    misspell
    sv -w 10 start x-msrv
    t 'a bad file is in the log' within 10 says 'max-massages' cat /var/log/x-msrv/current
    t 'sv stop' sv -w 60 stop x-msrv
    rm /etc/service/x-msrv
    t 'it is no longer supervised' within 20 not pgrep -x runsv
}

do_templates() {
    configure /etc/x-msrv/one.conf one 10
    configure /etc/x-msrv/two.conf two 10
    edit_period x-msrv@two.timer 2s
    t 'an instance of the daemon starts' systemctl start x-msrv-daemon@one
    t 'and one of the timer' systemctl start x-msrv@two.timer
    ends publish one 15
    ends publish two 15
    t 'the first moves its messages' within 15 all_stored one 15
    t 'the second its own' within 15 all_stored two 15
    t 'no window of either took more than N' within 5 windows_of one 10 15
    t 'of the other neither' within 5 windows_of two 10 15
    configure /etc/x-msrv/one.conf one-b 10
    t 'an instance is reloaded' systemctl reload x-msrv-daemon@one
    ends publish one-b 5
    t 'from its own file' within 15 all_stored one-b 5
    t 'the daemon makes the timer of its name stop, no other' active x-msrv@two.timer
    systemctl stop x-msrv-daemon@one x-msrv@two.timer
}

# The previous version runs in three ways under load; it is replaced; nothing is lost.
do_upgrade() {
    if [ "$(previous)" = "$(newest)" ]; then skip 'the repository has no previous version'; return; fi
    { remove; purge; } >/dev/null 2>&1
    t 'the previous version is installed' install "$(previous)"
    t 'it is the previous one' is "$(installed)" "$(previous)"
    configure $conf upgrade 0
    configure /etc/x-msrv/one.conf upgrade-one 0
    configure /etc/x-msrv/two.conf upgrade-two 0
    edit_period x-msrv.timer 2s
    edit_period x-msrv@two.timer 2s
    systemctl enable --now x-msrv.timer >/dev/null 2>&1
    systemctl start x-msrv-daemon@one x-msrv@two.timer
    load upgrade upgrade-one upgrade-two
    for topic in upgrade upgrade-one upgrade-two; do t "messages of $topic move" grows $topic; done
    invocation=$(show InvocationID x-msrv-daemon@one)
    t 'the package manager upgrades it' install "$(newest)"
    t 'to the newest version' is "$(installed)" "$(newest)"
    t 'that is the one that runs' says "^x-msrv $(newest)" x-msrv --version
    t 'the timer is active again' active x-msrv.timer
    t 'so is its instance' active x-msrv@two.timer
    t 'the daemon'\''s instance runs' ready x-msrv-daemon@one
    t 'it was restarted' not same x-msrv-daemon@one InvocationID "$invocation"
    t 'what did not run does not' inactive x-msrv-daemon
    t 'what was enabled is' systemctl is-enabled x-msrv.timer
    t 'the edited file is kept' says '^topic = upgrade$' cat $conf
    t 'the new one lies beside it' test -e "$new_file"
    for topic in upgrade upgrade-one upgrade-two; do t "messages of $topic move again" grows $topic; done
    unload
    for topic in upgrade upgrade-one upgrade-two; do t "of $topic nothing is lost" within 30 all_stored $topic "$sent"; done
    t 'no unit failed' is "$(systemctl list-units --failed --plain --no-legend 'x-msrv*')" ''
    t 'nothing is noted as paused' not test -e /run/x-msrv.paused
    systemctl disable --now x-msrv.timer >/dev/null 2>&1
    systemctl stop x-msrv-daemon@one x-msrv@two.timer
}

# All forms at once run, as far as they can beside each other.
do_remove() {
    configure $conf remove 10
    configure /etc/x-msrv/one.conf remove-one 10
    configure /etc/x-msrv/two.conf remove-two 10
    systemctl enable --now x-msrv.timer x-msrv-daemon@one >/dev/null 2>&1
    systemctl start x-msrv@two.timer
    t 'the package manager removes it' remove
    for unit in x-msrv.timer x-msrv-daemon@one.service x-msrv@two.timer; do
        t "$unit is stopped" within 10 not systemctl is-active --quiet $unit
        t "$unit is known no more" same $unit LoadState not-found
    done
    t 'no process of the user is left' within 10 not pgrep -u x-msrv
    t 'the program is gone' not test -e /usr/bin/x-msrv
    t 'with its bytecode' not test -e /usr/share/x-msrv
    t 'with its libraries and their bytecode' not test -e /usr/lib/x-msrv
    t 'the other pipelines'\'' files stay' test -e /etc/x-msrv/one.conf
    t 'no link of an enabled unit is left' is "$(find $units -lname '*x-msrv*')" ''
    t 'the edited file is kept' says '^topic = remove$' cat $conf*
}

do_purge() {
    quiet
    t 'it is purged' purge
    t 'no configuration is left' not test -e /etc/x-msrv
    t 'no state is left' not test -e /var/lib/x-msrv
    list_files >"$work/after"
    if [ -e "$work/before" ]; then
        t 'nothing is left that was not there before' is "$(comm -13 "$work/before" "$work/after" | head -n 20)" ''
    fi
    t 'but the user' id x-msrv
    t 'no unit has failed' is "$(systemctl list-units --failed --plain --no-legend 'x-msrv*')" ''
}

echo 'TAP version 13'
# shellcheck disable=SC2048
for section in ${*:-$all}; do
    case " $all " in
        *" $section "*) ;;
        *) echo "Bail out! no section $section; there are: $all"; exit 64 ;;
    esac
    [ "$section" = install ] || [ -n "$store" ] || start_ends
    quiet
    "do_$section"
    quiet
done
echo "1..$number"
[ $failed = 0 ]
