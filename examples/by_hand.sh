# What an administrator does with a new DIMM, and when one of its blocks does not go.
# Usage: kmm shell --scenario examples/first_dimm.toml --steps 0 -- bash examples/by_hand.sh
cd /sys/devices/system/memory || exit

echo "dimm9 1 0x180000000 256M" > "$KMM_DIR/.kmm/plug"
grep node "$KMM_DIR/.kmm/uevents"

echo online_movable > memory48/state
cat memory48/valid_zones

echo "busy 48" > "$KMM_DIR/.kmm/fail"
if ! echo offline > memory48/state; then
  cat memory48/state
  echo forget > "$KMM_DIR/.kmm/fail"
  echo offline > memory48/state
  cat memory48/state
fi
