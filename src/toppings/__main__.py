from toppings.cli import main

main()
