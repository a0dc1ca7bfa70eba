from rgtg_fast.cli import main

main()
