.PHONY: run test check bench soak

run: ; @python3 dev.py demo

test: ; @python3 dev.py test

check: ; @python3 dev.py check

bench: ; @python3 dev.py bench

soak: ; @python3 dev.py soak
