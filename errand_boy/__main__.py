from errand_boy._cli.args import main

if __name__ == "__main__":
    raise SystemExit(main())
